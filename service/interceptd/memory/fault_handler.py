"""The intercept path: begin, resolve, commit, around again, within bounds.

Owns the decision about one access that takes more than a look. Must not know connections or messages.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from time import perf_counter_ns

import trio
from msgspec.structs import replace

from intercept_protocol.addresses import PAGE_SHIFT
from intercept_protocol.errors import WireError
from intercept_protocol.outcomes import Access, Answer, allows
from interceptd.address_space import AddressSpace, Caller, Undecided
from interceptd.memory.attempt import Attempt, Busy
from interceptd.memory.guest_mappings import PER_YIELD
from interceptd.memory.region import KindOrigin, Region, RegionState
from interceptd.memory.region_manager import RegionManager
from interceptd.pages.mapping import Extent, Mapping
from interceptd.telemetry.counters import Stages
from interceptd.telemetry.histogram import LatencyHistogram

ROUNDS = 16
"""Times that one intercept looks again before it is told RETRY: a VMM that invalidates without end keeps its
own VPs busy, not ours."""


class FaultHandler:
    """Decides a partition's memory intercepts. `timeout` bounds one, in seconds."""

    def __init__(self, regions: RegionManager, address_space: AddressSpace, timeout: float) -> None:
        self._regions = regions
        self._address_space = address_space
        self._timeout = timeout
        self.stages = Stages()

    async def handle(
        self, gfn: int, access: Access, about_to_wait: Callable[[Busy | None], Answer | None]
    ) -> Answer:
        """Decide an access that could not be answered on the spot; bounded by the timeout and by `ROUNDS`.

        `about_to_wait` is called before each wait for what is busy and, with None, before each round that may
        block; it may answer instead (a kept kick).
        Cancelling is safe at any time: an attempt is finished, and a commit that has begun is completed.
        """
        answer = Answer.CONTENDED
        deadline = trio.current_time() + self._timeout
        with trio.move_on_at(deadline):
            for _ in range(ROUNDS):
                match self._regions.begin(gfn, access):
                    case Mapping():
                        return Answer.ALREADY_MAPPED
                    case Answer() as decided:
                        return decided
                    case Busy(until, answer) as busy:
                        if (instead := about_to_wait(busy)) is not None:
                            return instead
                        with _timed(self.stages.wait):
                            await until.wait()
                    case attempt:
                        answer = Answer.CONTENDED
                        if self._may_wait() and (instead := about_to_wait(None)) is not None:
                            self._regions.finish(attempt)
                            return instead
                        if (verdict := await self._try(attempt, deadline)) is not None:
                            return verdict
                        await (
                            trio.lowlevel.checkpoint()
                        )  # a round need not wait for anything: here it may end
        return answer

    async def handle_nowait(self, gfn: int, access: Access) -> Answer | None:
        """Begin, resolve and commit in one step, if nobody is to be waited for; None if `handle` is to
        decide.

        What a `handle` costs that can be interrupted is spared: 15 us of 60.
        """
        if self._address_space.may_block or not self._regions.uncontended:
            return None
        step = self._regions.begin(gfn, access)
        if not isinstance(step, Attempt):
            return None
        return await self._try(step, trio.current_time() + self._timeout)

    def _may_wait(self) -> bool:
        """Whether the next round may be held up by the VMM or by another's map."""
        return self._address_space.may_block or self._regions.busy

    async def populate(self, region: Region) -> None:
        """Map a pinned region whole, or leave nothing of it and raise EFAULT, or the number of `Undecided`.

        The region is in the list and not live; one attempt spans it, so that any invalidation meanwhile fails
        the add.
        """
        try:
            attempt = self._regions.begin_whole(region)
            try:
                extents = await self._resolve_whole(region)
                answer = await self._regions.commit(attempt, extents)
                if attempt.stale:
                    raise _unpopulated(region, "its memory was invalidated meanwhile")
                if answer is Answer.HYPERVISOR_ERROR:
                    raise _unpopulated(region, "the hypervisor refused the map")
                region.state = RegionState.LIVE
            finally:
                self._regions.finish(attempt)
        except BaseException:
            with trio.CancelScope(shield=True):
                await self._regions.remove(region)
            raise

    async def _try(self, attempt: Attempt, deadline: float) -> Answer | None:
        """One round; None when nothing can be decided because the attempt went stale, a "no" included."""
        region = attempt.region
        try:
            with _timed(self.stages.resolve):
                extent = await self._resolve(attempt)
            if attempt.stale:
                return None
            if extent is None or not region.fits(extent):
                return Answer.UNBACKED
            if not allows(region.rights(extent), attempt.access):
                return Answer.PERMISSION
            with _timed(self.stages.map):
                return await self._regions.commit(attempt, [extent], deadline)
        except Undecided:
            return Answer.CONTENDED
        finally:
            self._regions.finish(attempt)

    async def _resolve(self, attempt: Attempt) -> Extent | None:
        """What stands behind the page; also whether it is device memory, where the kind depends on it."""
        page, region = attempt.uaddr_page, attempt.region
        extent = await self._address_space.resolve(page, attempt.window.uaddrs, region.uaddrs)
        if extent is not None and extent.io is None and region.kind_origin is KindOrigin.INFERRED:
            return replace(extent, io=await self._address_space.is_io(page))
        return extent

    async def _resolve_whole(self, region: Region) -> list[Extent]:
        extents: list[Extent] = []
        page = region.uaddrs.start
        while page < region.uaddrs.end:
            try:
                extent = await self._address_space.resolve(page, region.uaddrs, region.uaddrs, Caller.VMM)
            except Undecided as error:
                raise _unpopulated(region, str(error), error.number) from error
            if extent is None:
                raise _unpopulated(region, f"nothing is mapped at uaddr {page << PAGE_SHIFT:#x}")
            if Access.READ not in extent.access:
                raise _unpopulated(region, f"uaddr {page << PAGE_SHIFT:#x} may not be read")
            extents.append(extent)
            page = extent.uaddrs.end
            if not len(extents) % PER_YIELD:
                await trio.lowlevel.checkpoint()
        return extents


class _timed:  # reads as what it does: `with _timed(histogram)`
    """Record how long the block took, however it ended. A generator would take three times as long."""

    __slots__ = ("_began", "_histogram")

    def __init__(self, histogram: LatencyHistogram) -> None:
        self._histogram = histogram

    def __enter__(self) -> None:
        self._began = perf_counter_ns()

    def __exit__(self, *_: object) -> None:
        self._histogram.record(perf_counter_ns() - self._began)


def _unpopulated(region: Region, why: str, number: int = errno.EFAULT) -> WireError:
    return WireError(number, f"pinned region {region.gfns} cannot be populated: {why}")
