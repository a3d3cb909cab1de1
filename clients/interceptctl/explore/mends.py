"""The daemon's core with one thing taken out, one class each: is it found?

Owns what is taken out. A mend that nobody misses is either not needed or not looked for. Each class is the
daemon's own but for the one behaviour that its docstring names.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

from intercept_protocol.addresses import GfnRange, UaddrRange
from intercept_protocol.messages import RegionKind
from intercept_protocol.outcomes import Access, Answer
from interceptd.address_space.declared import DeclaredAddressSpace
from interceptd.attempt import Attempt, Obstacle
from interceptd.hypervisor.software import SoftwareHypervisor
from interceptd.intercept import InterceptPath
from interceptd.mapping import HOST_BACKING, Extent, Frame, Mapping, insert_joined
from interceptd.mmu_notifier import Batch, MmuNotifier, OpenInvalidation, Window
from interceptd.progress_guard import ProgressGuard
from interceptd.region import Region
from interceptd.region_list import RegionList
from interceptd.region_manager import RegionManager
from interceptd.virtual_processor import VirtualProcessor

from .model_partition import Parts


class CommitsStale(RegionManager):
    """Commit does not look whether the attempt went stale."""

    async def commit(self, attempt: Attempt, extents: Iterable[Extent]) -> Answer | None:
        fresh = replace(attempt, window=Window(attempt.window.uaddrs))
        return await super().commit(fresh, extents)


class BelievesStaleNo(RegionManager):
    """Commit looks for staleness, but a "nothing is there" is believed without."""

    def __init__(self, **options: object) -> None:
        super().__init__(**options)  # type: ignore[arg-type] # they are passed on
        self._real: dict[int, Window] = {}

    def begin(self, gfn: int, access: Access) -> Mapping | Answer | Obstacle | Attempt:
        step = super().begin(gfn, access)
        if not isinstance(step, Attempt):
            return step
        shown = Window(step.window.uaddrs)
        self._real[id(shown)] = step.window
        return replace(step, window=shown)

    async def commit(self, attempt: Attempt, extents: Iterable[Extent]) -> Answer | None:
        real = self._real.get(id(attempt.window), attempt.window)
        return await super().commit(replace(attempt, window=real), extents)

    def finish(self, attempt: Attempt) -> None:
        real = self._real.pop(id(attempt.window), attempt.window)
        super().finish(replace(attempt, window=real))


class MapsTheWhole(RegionManager):
    """Commit maps all that was resolved, not the gaps alone."""

    def _gaps(self, wanted: Mapping) -> list[Mapping]:
        return [wanted]


class RecordsAfterwards(RegionManager):
    """The record is made when the call is back; until then nobody knows of it."""

    async def _map(self, region: Region, mapping: Mapping) -> None:  # noqa: ARG002
        await self._hypervisor.map_gpa(mapping)
        self._mappings.carve(mapping)
        insert_joined(self._mappings, mapping)


class HidesNothing(RegionManager):
    """No "being mapped": who faults while the call is out is told what the record says."""

    def _changing(self, gfns: GfnRange) -> AbstractContextManager[None]:  # type: ignore[override] # noqa: ARG002
        return nullcontext()


class UnlinksFirst(RegionManager):
    """Remove unlinks under one hold of the lock, and unmaps under another."""

    async def remove_exactly(self, gfns: GfnRange, uaddrs: UaddrRange) -> None:
        async with self._lock:
            region = self._regions.exactly(gfns, uaddrs)
            self._regions.remove(region)
            self._notifier.mark_stale(region.uaddrs)
        async with self._lock:
            with self._changing(region.gfns):
                await self._hypervisor.unmap_gpa(region.gfns)
                self._mappings.carve(region.gfns)


class LeavesAttemptsFresh(MmuNotifier):
    """Remove unmaps, and leaves the attempts in the region fresh."""

    def mark_stale(self, uaddrs: UaddrRange) -> None:
        if self._announcing:
            super().mark_stale(uaddrs)

    _announcing = False

    def invalidate(self, uaddrs: UaddrRange) -> Batch:
        self._announcing = True
        try:
            return super().invalidate(uaddrs)
        finally:
            self._announcing = False


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
        self._regions = _NoOverlap(1 << 20)


class ForgetsAliases(RegionManager):
    """An invalidation reaches one of the regions over its memory."""

    def __init__(self, **options: object) -> None:
        super().__init__(**options)  # type: ignore[arg-type] # they are passed on
        self._regions = _FirstAlias(1 << 20)


class NeverFinishes(RegionManager):
    """Attempts are not ended."""

    def finish(self, attempt: Attempt) -> None:
        pass


class UnmapsNothing(RegionManager):
    """Invalidations are acknowledged, and nothing is unmapped."""

    async def _invalidate(self, region: Region, uaddrs: UaddrRange, *, exact: bool) -> None:
        pass


class ForgetsDangling(RegionManager):
    """A pinned region whose memory went is not marked."""

    async def _invalidate(self, region: Region, uaddrs: UaddrRange, *, exact: bool) -> None:  # noqa: ARG002
        await super()._invalidate(region, uaddrs, exact=False)


class ForgetsNoAccess(RegionManager):
    """Movable memory that went is unmapped, and not put back to NO_ACCESS."""

    async def _take_away(self, region: Region, gfns: GfnRange) -> None:
        plain = replace_kind(region, RegionKind.MMIO)
        await super()._take_away(plain, gfns)


def replace_kind(region: Region, kind: RegionKind) -> Region:
    return Region(region.gfns, region.uaddrs, kind, region.presumption, region.access)


class AcknowledgesEarly(MmuNotifier):
    """What is pending is acknowledged when it is taken, before anything is unmapped."""

    def take(self) -> Batch:
        batch = super().take()
        batch.done.set()
        return batch


class TakesBeforeTheLock(MmuNotifier):
    """The pending set is taken when the doorbell rings, and then the lock is waited for."""

    _early: Batch | None = None

    async def wait_rung(self) -> None:
        await super().wait_rung()
        self._early = super().take()

    def take(self) -> Batch:
        early, self._early = self._early, None
        return early or super().take()


class NeverCutsBack(MmuNotifier):
    """A window reaches into ranges that are being invalidated."""

    def cut_back(self, uaddrs: UaddrRange, page: int) -> UaddrRange:  # noqa: ARG002
        return uaddrs


class IgnoresOpenRanges(MmuNotifier):
    """Faults in an open range do not wait for its end."""

    def open_at(self, uaddrs: UaddrRange) -> OpenInvalidation | None:  # noqa: ARG002
        return None


class EndsAllAtOnce(MmuNotifier):
    """Equal begins are not counted: the first end opens the range."""

    def end(self, uaddrs: UaddrRange) -> None:
        if uaddrs in self._open:
            self._open_depth -= self._open[uaddrs].depth - 1
            self._open[uaddrs].depth = 1
            super().end(uaddrs)


class StaysFresh(MmuNotifier):
    """An invalidation marks no attempt stale."""

    def mark_stale(self, uaddrs: UaddrRange) -> None:
        pass


class Extrapolates(DeclaredAddressSpace):
    """One frame stands for the whole window, wherever its VMA ends."""

    async def resolve(self, page: int, window: UaddrRange, region: UaddrRange) -> Extent | None:
        extent = await super().resolve(page, window, region)
        if extent is None:
            return None
        base = Frame(HOST_BACKING, extent.frame.page + window.start - extent.uaddrs.start)
        return replace(extent, uaddrs=window, frame=base)


class GivesAllRights(RegionManager):
    """The region's rights are given, whatever the VMA's are."""

    async def commit(self, attempt: Attempt, extents: Iterable[Extent]) -> Answer | None:
        generous = [replace(extent, access=Access.READ | Access.WRITE) for extent in extents]
        return await super().commit(attempt, generous)


class ForwardsWhenBusy(RegionManager):
    """What would have to wait is handed to the VMM."""

    def begin(self, gfn: int, access: Access) -> Mapping | Answer | Obstacle | Attempt:
        step = super().begin(gfn, access)
        return Answer.UNBACKED if isinstance(step, Obstacle) else step


class ResolvesUnderTheLock(InterceptPath):
    """The region lock is held while the address space is asked."""

    async def _try(self, attempt: Attempt) -> Answer | None:
        async with self._regions._lock:
            await self._address_space.resolve(
                attempt.uaddr_page, attempt.window.uaddrs, attempt.region.uaddrs
            )
        return await super()._try(attempt)


class RollsBackToNothing(SoftwareHypervisor):
    """A failed map is unmapped, and what it replaced is not put back."""

    def _roll_back(self, done: GfnRange, before: list[Mapping]) -> None:  # noqa: ARG002
        super()._roll_back(done, [])


class _Tireless(ProgressGuard):
    def answer(self, mapping: Mapping, gfn: int, access: Access) -> Answer:
        self.reset()
        return super().answer(mapping, gfn, access)


class NeverGivesUp(VirtualProcessor):
    """No progress guard: the same access is answered RESUME for ever."""

    def __init__(self, *arguments: object, **options: object) -> None:
        super().__init__(*arguments, **options)  # type: ignore[arg-type] # they are passed on
        self._guard = _Tireless()


class ForgetsKicks(VirtualProcessor):
    """A kick that finds nothing waiting is lost."""

    def kick(self) -> None:
        if self._waiting is not None:
            super().kick()


@dataclass(frozen=True)
class Mend:
    """`parts` are the daemon's, with this mend taken out."""

    about: str
    parts: Parts


def _without(parts: Parts, culprit: type[object]) -> Mend:
    about = (culprit.__doc__ or "").strip()
    return Mend(about, parts)


MENDS = {
    "staleness-at-commit": _without(Parts(regions=CommitsStale), CommitsStale),
    "staleness-of-no": _without(Parts(regions=BelievesStaleNo), BelievesStaleNo),
    "stale-marks": _without(Parts(notifier=StaysFresh), StaysFresh),
    "window-cut-back": _without(Parts(notifier=NeverCutsBack), NeverCutsBack),
    "waiting-for-open-ranges": _without(Parts(notifier=IgnoresOpenRanges), IgnoresOpenRanges),
    "counted-begins": _without(Parts(notifier=EndsAllAtOnce), EndsAllAtOnce),
    "gaps-only": _without(Parts(regions=MapsTheWhole), MapsTheWhole),
    "record-before-call": _without(Parts(regions=RecordsAfterwards), RecordsAfterwards),
    "being-mapped-slot": _without(Parts(regions=HidesNothing), HidesNothing),
    "unlink-and-unmap-at-once": _without(Parts(regions=UnlinksFirst), UnlinksFirst),
    "stale-on-remove": _without(Parts(notifier=LeavesAttemptsFresh), LeavesAttemptsFresh),
    "unmap-on-invalidation": _without(Parts(regions=UnmapsNothing), UnmapsNothing),
    "acknowledge-after-unmap": _without(Parts(notifier=AcknowledgesEarly), AcknowledgesEarly),
    "pending-after-lock": _without(Parts(notifier=TakesBeforeTheLock), TakesBeforeTheLock),
    "disjoint-regions": _without(Parts(regions=AcceptsOverlaps), AcceptsOverlaps),
    "aliases": _without(Parts(regions=ForgetsAliases), ForgetsAliases),
    "clamp-to-vma": _without(Parts(address_space=Extrapolates), Extrapolates),
    "rights-of-the-vma": _without(Parts(regions=GivesAllRights), GivesAllRights),
    "retry-when-busy": _without(Parts(regions=ForwardsWhenBusy), ForwardsWhenBusy),
    "no-lock-across-resolve": _without(Parts(path=ResolvesUnderTheLock), ResolvesUnderTheLock),
    "finished-attempts": _without(Parts(regions=NeverFinishes), NeverFinishes),
    "dangling-mark": _without(Parts(regions=ForgetsDangling), ForgetsDangling),
    "no-access-on-invalidation": _without(Parts(regions=ForgetsNoAccess), ForgetsNoAccess),
    "no-access-on-roll-back": _without(Parts(hypervisor=RollsBackToNothing), RollsBackToNothing),
    "progress-guard": _without(Parts(processor=NeverGivesUp), NeverGivesUp),
    "kept-kick": _without(Parts(processor=ForgetsKicks), ForgetsKicks),
}
