"""One memory access of a guest, from the look-up to the answer: begin, resolve, commit, again, within bounds.

Owns the decision, and is all that a VP asks. Must not know connections or messages.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from time import perf_counter_ns
from typing import Protocol

import trio
from msgspec.structs import replace

from intercept_protocol.addresses import PAGE_LIMIT, PAGE_SHIFT, GfnRange, UaddrRange
from intercept_protocol.elements import about_element
from intercept_protocol.messages import RegionKind
from intercept_protocol.outcomes import Access, Answer, allows
from interceptd.address_space import AddressSpace, Caller, Undecided
from interceptd.memory.attempt import Attempt, Busy, Whole, unpopulated
from interceptd.memory.known_vmas import KnownVmas
from interceptd.memory.long_lists import LongList
from interceptd.memory.region import KindOrigin, Region, RegionState
from interceptd.memory.region_manager import RegionManager
from interceptd.pages.mapping import Extent, Mapping
from interceptd.scheduling.time_share import give_way
from interceptd.telemetry.counters import Stages
from interceptd.telemetry.histogram import LatencyHistogram
from interceptd.telemetry.trace import MAP, RESOLVE, STAGES, WAIT, Trace

ROUNDS = 16
"""Times that one access is tried before the answer is RETRY. A VMM that invalidates without end keeps only
its own VPs busy."""
CHANGED_PIECES = 4096
"""Extents that the pinned regions of one change may have. They are kept until all are resolved, and many
regions may be backed by the same VMAs, so nothing else bounds them."""
UNDECIDED_PAUSE = 0.02
"""Seconds before an undecided fault is answered RETRY. They limit a VP that asks again at once to 50 times
per second, and short-lived causes, such as a userfaultfd being closed, are over by then."""


class Known(Protocol):
    """What is known to back uaddrs, so that an address space that may block need not be asked."""

    @property
    def learns(self) -> bool:
        """Whether it must be told what the address space answers."""

    def find(self, page: int, window: UaddrRange) -> Extent | None:
        """The part of `window` around `page` that is known to be backed; None if that of the page is not."""

    def learn(self, extent: Extent) -> None: ...

    def forget(self, uaddrs: UaddrRange) -> None:
        """Know nothing of `uaddrs` any more."""


@dataclass(slots=True)
class Fault:
    """An access that the look-up did not decide. Handle it before the next checkpoint: what the look-up found
    holds until then."""

    gfn: int
    access: Access
    found: Busy | Region | None
    """By the look-up; None once the first attempt has used it."""
    waited: bool = False
    """Whether it had to wait for an invalidation, or for another VP's map."""
    spent: list[int] = field(default_factory=lambda: [0] * STAGES)
    """Nanoseconds in each stage (`telemetry.trace`), over all rounds."""
    decided_at: int | None = None
    """How many records a trace had when an answer was decided that waited before it was given."""


class FaultHandler:
    """Decides a partition's memory accesses. `timeout` bounds one, in seconds."""

    def __init__(
        self,
        regions: RegionManager,
        address_space: AddressSpace,
        timeout: float,
        known: Known | None = None,
    ) -> None:
        self._regions = regions
        self._address_space = address_space
        self._timeout = timeout
        self._known: Known = KnownVmas() if known is None else known
        """Of an address space that may block; of another one nothing is learned."""
        regions.learn_in_windows(self._known.forget)
        self.lookup = regions.lookup
        """`RegionManager.lookup`, unwrapped: most accesses need nothing else."""
        self.stages = Stages()
        self.trace: Trace | None = None
        """Told what backs the memory of a live process, as faults learn it."""
        self.split_large_pages = 0
        """Maps of only a part of a large page that could have been mapped whole."""

    def close(self) -> None:
        """The partition has ended: nothing is known of its memory."""
        self._known.forget(UaddrRange(start=0, end=PAGE_LIMIT))

    async def handle_nowait(self, fault: Fault) -> Answer | None:
        """Begin, resolve and commit where only the hypervisor may block, whose call is not broken off anyway;
        None if `handle` must decide, which pays for being interruptible.
        """
        region = fault.found
        if not isinstance(region, Region):
            return None
        if self._regions.quiet and (answer := await self._map_free(fault, region)):
            return answer
        if self._regions.busy:
            return None
        step = self._regions.begin(region, fault.gfn, fault.access)
        if isinstance(step, Busy):
            return None
        known = None
        if self._address_space.may_block and (known := self._recall_granted(step)) is None:
            self._regions.finish(step)
            return None
        fault.found = None
        return await self._try(fault, step, trio.current_time() + self._timeout, known)

    async def handle(self, fault: Fault, interrupted: Callable[[Answer], Answer | None]) -> Answer:
        """Decide a fault; bounded by the timeout and by `ROUNDS`.

        `interrupted` is called before each wait, with the answer if that never ends; an answer of its own
        ends the fault without that wait. Cancelling is safe at any time: an attempt is finished, and a commit
        that has begun is completed.
        """
        answer = Answer.CONTENDED
        deadline = trio.current_time() + self._timeout
        with trio.move_on_at(deadline):
            for _ in range(ROUNDS):
                match self._begin(fault):
                    case Mapping():
                        return Answer.ALREADY_MAPPED
                    case Answer() as decided:
                        return decided
                    case Busy(until, answer):
                        if (instead := interrupted(answer)) is not None:
                            return instead
                        fault.waited = True
                        with _timed(self.stages.wait, fault, WAIT):
                            await until.wait()
                        await give_way()  # many may have waited for the same
                    case attempt:
                        answer = Answer.CONTENDED
                        if self._may_wait() and (instead := interrupted(answer)) is not None:
                            self._regions.finish(attempt)
                            return instead
                        if (verdict := await self._try(fault, attempt, deadline)) is not None:
                            return verdict
                        await trio.lowlevel.checkpoint()  # nothing above need be one: here a round can end
        return answer

    async def _map_free(self, fault: Fault, region: Region) -> Answer | None:
        """The straight line of a first touch: it is quiet, what backs the page is known, and nothing is
        mapped there. None if that is not so, or the answer is a "no"."""
        began = perf_counter_ns()
        page = fault.gfn - region.gfns.start + region.uaddrs.start
        window = self._regions.window(region, fault.gfn)
        if self._address_space.may_block:
            extent = self._recall(page, window)
        else:
            extent = await self._address_space.resolve(page, window, region.uaddrs)
        if extent is None or not region.fits(extent):
            return None
        resolved = perf_counter_ns()
        mapping = region.mapping(extent)
        if not allows(mapping.access, fault.access):
            return None
        self._tell_backed(extent)
        answer = await self._regions.map_free(region, mapping)
        if answer is not None:
            ended = perf_counter_ns()
            fault.spent[RESOLVE], fault.spent[MAP] = resolved - began, ended - resolved
            self.stages.resolve.record(resolved - began)
            self.stages.map.record(ended - resolved)
            if answer is Answer.MAPPED:
                self.split_large_pages += region.splits_large_page(extent)
        return answer

    def _recall(self, page: int, window: UaddrRange) -> Extent | None:
        """What is known to back the page, after all that was reported."""
        return self._known.find(page, window) if self._address_space.drain_nowait() else None

    def _recall_granted(self, attempt: Attempt) -> Extent | None:
        """The same within the attempt's window, if it grants the access."""
        known = self._recall(attempt.uaddr_page, attempt.window.uaddrs)
        return known if known is not None and attempt.region.grants(known, attempt.access) else None

    def _begin(self, fault: Fault) -> Mapping | Answer | Busy | Attempt:
        """The next step of a fault: the first one goes on from what the look-up found."""
        step = fault.found or self._regions.lookup(fault.gfn, fault.access)
        fault.found = None
        return self._regions.begin(step, fault.gfn, fault.access) if isinstance(step, Region) else step

    def _may_wait(self) -> bool:
        """Whether the next round may have to wait, for the VMM or for another VP's map."""
        return self._address_space.may_block or self._regions.busy

    async def populate(self, region: Region) -> None:
        """Map a whole pinned region. If that fails, remove it and raise EFAULT, or the errno of `Undecided`.

        The region is in the list and not live yet. One attempt spans it, so any invalidation meanwhile fails
        the add. Once it is live nothing waits: the VMM's request must be recorded as carried out before the
        region can be recorded as dangling.
        """
        extents: LongList[Extent] = LongList()
        try:
            attempt = self._regions.begin_whole(region)
            try:
                await self._resolve_whole(region, extents)
                answer = await self._regions.commit(attempt, extents)
                await extents.free()
                if attempt.stale:
                    raise unpopulated(region, "its memory was invalidated meanwhile")
                if answer is Answer.HYPERVISOR_ERROR:
                    raise unpopulated(region, "the hypervisor refused the map")
                region.state = RegionState.LIVE
            finally:
                self._regions.finish(attempt)
        except BaseException:
            with trio.CancelScope(shield=True):
                await self._regions.remove(region)
            raise
        finally:
            await extents.free()

    async def change_regions(
        self, remove: Sequence[tuple[GfnRange, UaddrRange]], add: Sequence[Region]
    ) -> None:
        """`RegionManager.change`, with the pinned regions resolved before, one after the other.

        Raises what it raises, and for a pinned region what `populate` does. Cancelling is safe at any time:
        before the change nothing is kept, and a change that has begun is completed.
        """
        wholes: list[Whole] = []
        pieces = CHANGED_PIECES
        try:
            for index, region in enumerate(add):
                if region.kind is RegionKind.PINNED:
                    with about_element("add", index):
                        wholes.append(Whole(self._regions.begin_whole(region), LongList()))
                        await self._resolve_whole(region, wholes[-1].extents, pieces)
                        pieces -= len(wholes[-1].extents)
            await self._regions.change(remove, add, wholes)
        finally:
            for whole in wholes:
                self._regions.finish(whole.attempt)
                await whole.extents.free()

    async def _try(
        self, fault: Fault, attempt: Attempt, deadline: float, known: Extent | None = None
    ) -> Answer | None:
        """One round; None if the attempt went stale, which leaves even a negative result undecided. What is
        `known` is not asked for."""
        region = attempt.region
        try:
            with _timed(self.stages.resolve, fault, RESOLVE):
                extent = await self._resolve(attempt) if known is None else known
            if attempt.stale:
                return None
            if extent is None or not region.fits(extent):
                return Answer.UNBACKED
            self._tell_backed(extent)
            if not allows(region.rights(extent), attempt.access):
                return Answer.PERMISSION
            with _timed(self.stages.map, fault, MAP):
                answer = await self._regions.commit(attempt, [extent], deadline)
            if answer is Answer.MAPPED:
                self.split_large_pages += region.splits_large_page(extent)
        except Undecided:
            pass
        else:
            return answer
        finally:
            self._regions.finish(attempt)
        await trio.sleep(UNDECIDED_PAUSE)  # after the attempt: an invalidate may be waiting for its end
        return Answer.CONTENDED

    async def _resolve(self, attempt: Attempt) -> Extent | None:
        """What backs the page, within the attempt's window. Where that takes a question that may block, it is
        about all of the region where it is learned what that brings."""
        page, region, window = attempt.uaddr_page, attempt.region, attempt.window.uaddrs
        if not self._address_space.may_block:
            return await self._address_space.resolve(page, window, region.uaddrs)
        if (known := self._recall_granted(attempt)) is not None:
            return known
        if not self._known.learns:
            return await self._ask(page, window, region)
        look = self._regions.open_look(region, page)
        try:
            extent = await self._ask(page, look.uaddrs, region)
            if extent is None:
                return None
            if look.teaches:
                self._known.learn(extent)
        finally:
            self._regions.close_look(look)
        return extent.slice(max(extent.start, window.start), min(extent.end, window.end))

    async def _ask(self, page: int, window: UaddrRange, region: Region) -> Extent | None:
        """What backs `window` around the page, and whether that is device memory if the region's kind depends
        on it."""
        extent = await self._address_space.resolve(page, window, region.uaddrs)
        if extent is not None and extent.io is None and region.kind_origin is KindOrigin.INFERRED:
            extent = replace(extent, io=await self._address_space.is_io(page))
        return extent

    def _tell_backed(self, extent: Extent) -> None:
        if self.trace is not None:
            self.trace.backed(extent)

    async def _resolve_whole(
        self, region: Region, extents: LongList[Extent], pieces: float = math.inf
    ) -> None:
        """Append what backs the region, unless that takes more than so many pieces."""
        page = region.uaddrs.start
        while page < region.uaddrs.end:
            if len(extents) >= pieces:
                raise unpopulated(region, f"one change may pin {CHANGED_PIECES} pieces of memory")
            try:
                extent = await self._address_space.resolve(page, region.uaddrs, region.uaddrs, Caller.VMM)
            except Undecided as error:
                raise unpopulated(region, str(error), error.number) from error
            if extent is None:
                raise unpopulated(region, f"nothing is mapped at uaddr {page << PAGE_SHIFT:#x}")
            if Access.READ not in extent.access:
                raise unpopulated(region, f"uaddr {page << PAGE_SHIFT:#x} may not be read")
            self._tell_backed(extent)
            extents.append(extent)
            page = extent.uaddrs.end
            await give_way()


class _timed:  # lower case, because it is used like a function: `with _timed(histogram)`
    """Record how long a stage took, however it ended. A generator would cost three times as much."""

    __slots__ = ("_began", "_histogram", "_spent", "_stage")

    def __init__(self, histogram: LatencyHistogram, fault: Fault, stage: int) -> None:
        self._histogram = histogram
        self._spent = fault.spent
        self._stage = stage

    def __enter__(self) -> None:
        self._began = perf_counter_ns()

    def __exit__(self, *_: object) -> None:
        took = perf_counter_ns() - self._began
        self._histogram.record(took)
        self._spent[self._stage] += took
