"""Mutants of the region manager, its list and the guest's mappings.

Owns the mutants. Each class is the daemon's except for the fault that its docstring names.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

from msgspec import structs

from intercept_protocol.addresses import GfnRange, UaddrRange
from intercept_protocol.messages import RegionKind
from intercept_protocol.outcomes import Access, Answer
from interceptd.memory.attempt import Attempt, Busy
from interceptd.memory.guest_mappings import GuestMappings, Revocation
from interceptd.memory.region import Region
from interceptd.memory.region_list import RegionList
from interceptd.memory.region_manager import RegionManager
from interceptd.mmu_notifier import Window
from interceptd.pages.mapping import Extent, Mapping, insert_joined


class CommitsStale(RegionManager):
    """Commit does not check whether the attempt is stale."""

    async def commit(
        self, attempt: Attempt, extents: Iterable[Extent], deadline: float = math.inf
    ) -> Answer | None:
        fresh = replace(attempt, window=Window(attempt.window.uaddrs))
        return await super().commit(fresh, extents, deadline)


class BelievesStaleNo(RegionManager):
    """Commit checks for staleness, except if nothing was found."""

    def __init__(self, **options: object) -> None:
        super().__init__(**options)  # type: ignore[arg-type] # they are passed on
        self._real: dict[int, Window] = {}

    def begin(self, region: Region, gfn: int, access: Access) -> Busy | Attempt:
        step = super().begin(region, gfn, access)
        if not isinstance(step, Attempt):
            return step
        shown = Window(step.window.uaddrs)
        self._real[id(shown)] = step.window
        return replace(step, window=shown)

    async def commit(
        self, attempt: Attempt, extents: Iterable[Extent], deadline: float = math.inf
    ) -> Answer | None:
        real = self._real.get(id(attempt.window), attempt.window)
        return await super().commit(replace(attempt, window=real), extents, deadline)

    def finish(self, attempt: Attempt) -> None:
        real = self._real.pop(id(attempt.window), attempt.window)
        super().finish(replace(attempt, window=real))


class MapsTheWhole(GuestMappings):
    """Commit maps everything that was resolved, not only the gaps."""

    def _gaps(self, wanted: Mapping) -> list[Mapping]:
        return [wanted]


class RecordsAfterwards(GuestMappings):
    """The mapping is recorded only after the map call returns."""

    async def _map(
        self,
        region: Region,  # noqa: ARG002
        mappings: Sequence[Mapping],
        *,
        limited: bool = True,  # noqa: ARG002
    ) -> None:
        await self._hypervisor.map_gpas(mappings)
        for mapping in mappings:
            self._record.carve(mapping)
            insert_joined(self._record, mapping)


class HidesNothing(GuestMappings):
    """No "being mapped": faults during a map call are answered from the record."""

    def changing(self, gfns: Sequence[GfnRange]) -> AbstractContextManager[None]:  # noqa: ARG002
        return nullcontext()


class UnlinksFirst(RegionManager):
    """Remove releases the lock between unlinking and unmapping."""

    async def remove_exactly(self, gfns: GfnRange, uaddrs: UaddrRange) -> None:
        async with self._lock:
            region = self._regions.exactly(gfns, uaddrs)
            self._regions.remove(region)
            self._notifier.mark_stale(region.uaddrs)
        async with self._lock:
            going = self._mappings.revocation()
            await going.unmap_all(region, region.gfns)
            await going.finish()


class _FirstAlias(RegionList):
    def behind(self, uaddrs: UaddrRange) -> Iterator[Region]:
        return iter(list(super().behind(uaddrs))[:1])


class _NoOverlap(RegionList):
    def _overlapping(self, gfns: GfnRange) -> Region | None:  # noqa: ARG002
        return None


class AcceptsOverlaps(RegionManager):
    """A region may overlap another."""

    def __init__(self, **options: object) -> None:
        super().__init__(**options)  # type: ignore[arg-type] # they are passed on
        self._regions = _NoOverlap(lambda: 1 << 20)


class ForgetsAliases(RegionManager):
    """An invalidation reaches only one of the regions over its memory."""

    def __init__(self, **options: object) -> None:
        super().__init__(**options)  # type: ignore[arg-type] # they are passed on
        self._regions = _FirstAlias(lambda: 1 << 20)


class NeverFinishes(RegionManager):
    """Attempts are never finished."""

    def finish(self, attempt: Attempt) -> None:
        pass


class UnmapsNothing(RegionManager):
    """Invalidations are acknowledged, but nothing is unmapped."""

    async def _invalidate(
        self, region: Region, uaddrs: UaddrRange, going: Revocation, *, exact: bool
    ) -> None:
        pass


class ForgetsDangling(RegionManager):
    """A pinned region is not marked dangling when its memory is unmapped."""

    async def _invalidate(
        self,
        region: Region,
        uaddrs: UaddrRange,
        going: Revocation,
        *,
        exact: bool,  # noqa: ARG002
    ) -> None:
        await super()._invalidate(region, uaddrs, going, exact=False)


class _UnmapsMovable(Revocation):
    async def revoke(self, region: Region, gfns: GfnRange, *, exactly: bool = False) -> None:
        plain = _of_kind(region, RegionKind.MMIO)
        await super().revoke(plain, gfns, exactly=exactly)


class ForgetsNoAccess(GuestMappings):
    """Invalidated movable memory is unmapped instead of mapped NO_ACCESS."""

    def revocation(self) -> Revocation:
        return _UnmapsMovable(self)


def _of_kind(region: Region, kind: RegionKind) -> Region:
    return Region(region.gfns, region.uaddrs, kind, region.kind_origin, region.access)


class GivesAllRights(RegionManager):
    """Mappings get the rights of the region, whatever those of the VMA."""

    async def commit(
        self, attempt: Attempt, extents: Iterable[Extent], deadline: float = math.inf
    ) -> Answer | None:
        generous = [structs.replace(extent, access=Access.READ | Access.WRITE) for extent in extents]
        return await super().commit(attempt, generous, deadline)
