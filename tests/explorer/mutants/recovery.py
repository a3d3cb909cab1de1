"""Mutants of what is recorded for a successor, and of what it makes of that.

Owns the mutants. Each class is the daemon's except for the fault that its docstring names.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import msgspec

from explorer.failing_hypervisor import FailingHypervisor
from explorer.kept_log import KeptLog, LoggedCall
from intercept_protocol.addresses import GfnRange, UaddrRange
from interceptd.hypervisor.slat import SoftwareSlat
from interceptd.memory.region_manager import RegionManager
from interceptd.mmu_notifier import Batch, MmuNotifier
from interceptd.pages.mapping import Mapping
from interceptd.telemetry.counters import Source


class RecordsNothingGone(KeptLog):
    """What no request announces is not recorded."""

    def gone(self, start_page: int, end_page: int) -> None:
        pass


class RecordsServedEarly(MmuNotifier):
    """A batch is recorded as served when it is taken, before anything is unmapped."""

    def take(self) -> Batch:
        batch = super().take()
        if self._journal is not None:
            self._journal.served(batch.gone_count)
        return batch


class RecordsDoneFirst(KeptLog):
    """A call is recorded as done before it is carried out."""

    @contextmanager
    def carrying_out(self, call: LoggedCall) -> Iterator[list[msgspec.Struct | None]]:
        if call.METHOD in {"unmap_vma", "protect_vma"}:
            self._done(call, None)
            yield []
        else:
            with super().carrying_out(call) as reply:
                yield reply


class _ForgetsClears(SoftwareSlat):
    def clear(self, gfns: GfnRange) -> None:
        journal, self._journal = self._journal, None
        super().clear(gfns)
        self._journal = journal


class RecordsNoUnmaps(FailingHypervisor):
    """What is unmapped is not recorded."""

    def __init__(self, **options: object) -> None:
        super().__init__(**options)  # type: ignore[arg-type] # they are passed on
        self.table = _ForgetsClears(self.table._journal)


class RecordsNoDangling(RegionManager):
    """That a pinned region is dangling is not recorded."""

    def __init__(self, **options: object) -> None:
        super().__init__(**options)  # type: ignore[arg-type] # they are passed on
        self._journal = None


class BelievesStrays(RegionManager):
    """A successor believes every mapping that lies in a region, whatever memory it is of."""

    async def take_over_mapping(self, entry: Mapping) -> list[GfnRange]:
        regions = list(self._over(entry.gfns))
        for region in regions:
            part = region.gfns.clip(entry.gfns)
            if part is not None and entry.access:
                self._mappings.take_over(region, entry.slice(part.start, part.end))
        return [] if regions else [entry.gfns]


class BelievesRights(RegionManager):
    """A successor believes a mapping that has rights which its region has not."""

    async def take_over_mapping(self, entry: Mapping) -> list[GfnRange]:
        before = [(region, region.access) for region in self._over(entry.gfns)]
        for region, access in before:
            region.access = access | entry.access
        strays = await super().take_over_mapping(entry)
        for region, access in before:
            region.access = access
        return strays


class LeavesGaps(RegionManager):
    """A successor does not map NO_ACCESS where movable memory has nothing."""

    async def close_gaps(self, table: SoftwareSlat) -> None:
        pass


class ReopensNothing(MmuNotifier):
    """A successor does not open the ranges that were open."""

    _begins = False

    def begin(self, uaddrs: UaddrRange, source: Source = Source.NOTIFIER, *, ring: bool = True) -> Batch:
        self._begins = True
        return super().begin(uaddrs, source, ring=ring)

    def reopen(self, uaddrs: UaddrRange, source: Source = Source.NOTIFIER, *, ring: bool = True) -> Batch:
        return super().reopen(uaddrs, source, ring=ring) if self._begins else self.invalidate(uaddrs, source)


class AnnouncesNothingAgain(MmuNotifier):
    """A successor does not take away what had gone, and was not served."""

    def invalidate(self, uaddrs: UaddrRange, source: Source = Source.NOTIFIER, *, ring: bool = True) -> Batch:
        if self._journal is not None and source is Source.USERFAULTFD:
            self._journal.gone(uaddrs.start, uaddrs.end)
        return super().invalidate_again(uaddrs, source, ring=ring)

    def invalidate_again(
        self,
        uaddrs: UaddrRange,  # noqa: ARG002 - all are forgotten
        source: Source,  # noqa: ARG002
        *,
        ring: bool = True,  # noqa: ARG002
    ) -> Batch:
        return self._pending
