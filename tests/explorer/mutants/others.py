"""Mutants of the notifier, the ports, the fault handler and the VP.

Owns the mutants. Each class is the daemon's except for the fault that its docstring names.
"""

from __future__ import annotations

from msgspec.structs import replace

from explorer.failing_hypervisor import FailingHypervisor
from intercept_protocol.addresses import GfnRange, UaddrRange
from intercept_protocol.outcomes import Access, Answer
from interceptd.address_space import Caller
from interceptd.address_space.declared import DeclaredAddressSpace
from interceptd.memory.attempt import Attempt, Busy
from interceptd.memory.fault_handler import Fault, FaultHandler
from interceptd.mmu_notifier import PENDING_PIECES, Batch, MmuNotifier, OpenInvalidation
from interceptd.pages.mapping import HOST_BACKING, Extent, Frame, Mapping
from interceptd.partition.progress_guard import ProgressGuard
from interceptd.partition.virtual_processor import VirtualProcessor
from interceptd.telemetry.counters import Source


class LeavesAttemptsFresh(MmuNotifier):
    """Remove unmaps, but does not mark the attempts in the region stale."""

    def mark_stale(self, uaddrs: UaddrRange) -> None:
        if self._announcing:
            super().mark_stale(uaddrs)

    _announcing = False

    def _invalidate(self, uaddrs: UaddrRange, source: Source, *, ring: bool) -> Batch:
        self._announcing = True
        try:
            return super()._invalidate(uaddrs, source, ring=ring)
        finally:
            self._announcing = False


class AcknowledgesEarly(MmuNotifier):
    """A batch is acknowledged when it is taken, before anything is unmapped."""

    def take(self) -> Batch:
        batch = super().take()
        batch.done.set()
        return batch


class TakesBeforeTheLock(MmuNotifier):
    """The pending set is taken when the doorbell rings, before the lock is acquired."""

    _early: Batch | None = None

    async def wait_rung(self) -> None:
        await super().wait_rung()
        self._early = super().take()

    def take(self) -> Batch:
        early, self._early = self._early, None
        return early or super().take()


class DropsOverflow(MmuNotifier):
    """Invalidations that come while the pending set is full are dropped."""

    def _invalidate(self, uaddrs: UaddrRange, source: Source, *, ring: bool) -> Batch:
        full = len(self._pending.pieces) == PENDING_PIECES
        return self._pending if full else super()._invalidate(uaddrs, source, ring=ring)


class NeverCutsBack(MmuNotifier):
    """Windows are not cut back to exclude ranges that are being invalidated."""

    def cut_back(self, uaddrs: UaddrRange, page: int) -> UaddrRange:  # noqa: ARG002
        return uaddrs


class IgnoresOpenRanges(MmuNotifier):
    """Faults in an open range do not wait for its end."""

    def open_at(self, uaddrs: UaddrRange) -> OpenInvalidation | None:  # noqa: ARG002
        return None


class EndsAllAtOnce(MmuNotifier):
    """Equal begins are not counted: the first end ends them all."""

    def end(self, uaddrs: UaddrRange, source: Source = Source.NOTIFIER) -> None:
        if uaddrs in self._open:
            self._open_depth -= self._open[uaddrs].depth - 1
            self._open[uaddrs].depth = 1
            super().end(uaddrs, source)


class StaysFresh(MmuNotifier):
    """An invalidation marks no attempt stale."""

    def mark_stale(self, uaddrs: UaddrRange) -> None:
        self._forget_learned(uaddrs)


class Extrapolates(DeclaredAddressSpace):
    """One frame is extrapolated over the whole window, beyond the end of its VMA."""

    async def resolve(
        self, page: int, window: UaddrRange, region: UaddrRange, caller: Caller = Caller.GUEST
    ) -> Extent | None:
        extent = await super().resolve(page, window, region, caller)
        if extent is None:
            return None
        base = Frame(HOST_BACKING, extent.frame.page + window.start - extent.uaddrs.start)
        return replace(extent, uaddrs=window, frame=base)


class ResolvesUnderTheLock(FaultHandler):
    """The region lock is held while the address space resolves."""

    async def _try(
        self, fault: Fault, attempt: Attempt, deadline: float, known: Extent | None = None
    ) -> Answer | None:
        async with self._regions._lock:
            await self._address_space.resolve(
                attempt.uaddr_page, attempt.window.uaddrs, attempt.region.uaddrs
            )
        return await super()._try(fault, attempt, deadline, known)


class ForwardsWhenBusy(FaultHandler):
    """What would have to wait is handed to the VMM."""

    def _begin(self, fault: Fault) -> Mapping | Answer | Busy | Attempt:
        step = super()._begin(fault)
        return Answer.UNBACKED if isinstance(step, Busy) else step


class RollsBackToNothing(FailingHypervisor):
    """A failed map is unmapped, and what it replaced is not put back."""

    def _roll_back(self, done: GfnRange, before: list[Mapping]) -> None:  # noqa: ARG002
        super()._roll_back(done, [])


class _Tireless(ProgressGuard):
    def answer(self, mapping: Mapping, gfn: int, access: Access) -> Answer:
        self.reset()
        return super().answer(mapping, gfn, access)


class NeverGivesUp(VirtualProcessor):
    """No progress guard: the same access is answered RESUME forever."""

    def __init__(self, *arguments: object, **options: object) -> None:
        super().__init__(*arguments, **options)  # type: ignore[arg-type] # they are passed on
        self._guard = _Tireless()


class ForgetsKicks(VirtualProcessor):
    """A kick while no intercept waits is lost."""

    def kick(self) -> None:
        if self._waiting is not None:
            super().kick()
