"""The faults of a restored guest: reads the userfaultfd, and has each missing page brought in.

Owns the order of one message from the read to its effect, and what is tried again when. It stands where the
VPs of another guest stand. Must not know how pages are kept, or where their bytes come from.

A message that a page was given back takes effect in the step in which it is read, whatever else goes on: its
thread waits for that, and the kernel lets nothing in before. A fault is decided in the same step, too, unless
it must wait; then a task goes on with it. Whatever becomes of it, in the end the page is brought in, or its
thread is woken and looks again.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from time import perf_counter_ns
from typing import Final

import structlog
import trio

from intercept_protocol.addresses import PAGE_SHIFT, GfnRange, UaddrRange
from intercept_protocol.errors import WireError
from intercept_protocol.events import InterceptAnswered
from intercept_protocol.outcomes import Access, Answer
from interceptd.address_space.image import ImageAddressSpace
from interceptd.address_space.missing_faults import MissingFaults
from interceptd.hypervisor import HypervisorError
from interceptd.hypervisor.userfaultfd import UserfaultfdHypervisor
from interceptd.memory.fault_handler import Fault, FaultHandler
from interceptd.memory.region import Region
from interceptd.mmu_notifier import MmuNotifier
from interceptd.pages.mapping import Mapping
from interceptd.scheduling.time_share import give_way
from interceptd.telemetry.counters import Source
from interceptd.telemetry.event_bus import PartitionPublisher
from interceptd.telemetry.histogram import InterceptLatency
from interceptd.telemetry.trace import DECODE

log = structlog.get_logger()

READER_INDEX: Final = 0
"""In views it stands where VP 0 does."""
TASKS: Final = 64
"""Faults that wait at a time, for the image or for a change; more of them wait for their turn."""
WOKEN: Final = 1024
"""Threads that were woken and are remembered."""
ROOM_SECONDS: Final = 0.1
"""Interval of the look whether there is room for what is given back."""
SPURIOUS_WAKE_SECONDS: Final = 0.001
"""Pause after a wake-up without a message, as in `address_space/unmap_watch.py`."""


@dataclass(slots=True, eq=False)
class _Pause:
    """Faults that are tried again after a while, which doubles as long as none that waited gets on."""

    first: float
    most: float
    """Seconds."""
    seconds: float = 0.0
    """That the next pause takes."""
    gfns: list[int] = field(default_factory=list)
    is_on: bool = False


@dataclass(slots=True, eq=False)
class _Owed:
    """A fault that waits for something."""

    access: Access
    began: int
    """When it was read."""
    again: bool = False
    """Whether it was read again since."""


class FaultReader:
    """`regions` are all of the guest, and stay. It has the attributes of a `VirtualProcessor` that views and
    the end of a partition use. `latency` is of each fault from its read to the page that it brought in."""

    index = READER_INDEX

    def __init__(
        self,
        uffd: MissingFaults,
        *,
        regions: Sequence[Region],
        faults: FaultHandler,
        notifier: MmuNotifier,
        memory: ImageAddressSpace,
        hypervisor: UserfaultfdHypervisor,
        answers: Counter[Answer],
        event_bus: PartitionPublisher,
    ) -> None:
        self._uffd = uffd
        self._regions = regions
        self._region = regions[0]
        """In which the last fault was."""
        self._faults = faults
        self._notifier = notifier
        self._memory = memory
        self._hypervisor = hypervisor
        self.answers = answers
        self._event_bus = event_bus
        self._owed: dict[int, _Owed] = {}
        """By gfn, the faults that something goes on with: they are in the queue, in a task or in a pause."""
        self._queue: deque[int] = deque()
        self._tasks = 0
        self._woken: dict[int, Mapping] = {}
        """By gfn, the mapping with which a thread was told to look again. If it comes back with the same one,
        it waits for a while first: nobody spins (I8), whatever is wrong."""
        self._changing = _Pause(0.0005, 0.064, 0.0005)
        self._failing = _Pause(0.1, 5.0, 0.1)
        self._idle = trio.Event()
        self._idle.set()
        self.latency = InterceptLatency()
        self.retries = 0
        """Times that nothing could be decided because the VMM's memory was changing."""
        self.held_up = ""
        """Why nothing is read; empty if it is."""
        self.first_fault_ns: int | None = None
        self.last_fault_ns: int | None = None
        """By the performance counter."""

    @property
    def state(self) -> str:
        """Whether the guest waits for a page that cannot be brought in at once."""
        return "waiting" if self._owed else "running"

    @property
    def oldest_fault_ms(self) -> int:
        """How long that fault has waited which waits longest, or 0."""
        if not self._owed:
            return 0
        return (perf_counter_ns() - next(iter(self._owed.values())).began) // 1_000_000

    @property
    def intercepts(self) -> int:
        return self.latency.count

    async def run(self) -> None:
        """Serve until cancelled, or until the VMM's memory is gone. Raises `PartitionLost`."""
        async with trio.open_nursery() as self._nursery:
            await self._read()
            self._nursery.cancel_scope.cancel()

    async def wait_idle(self) -> None:
        """Block until no fault waits."""
        await self._idle.wait()

    def wake_all(self) -> None:
        """Have all faults read again that a predecessor has read and not answered."""
        for region in self._regions:
            self._hypervisor.wake(region.uaddrs)

    def kick(self) -> None:
        """Does nothing, and so do `fail` and `drain`: no thread waits for an answer on a connection. Who
        waits for a page goes on with its process's end, or when another daemon serves it."""

    fail = drain = kick

    async def wait_quiet(self) -> None:
        """Returns at once, as above."""

    # ------------------------------------------------ reading

    async def _read(self) -> None:
        uffd, hypervisor = self._uffd, self._hypervisor
        is_awake = False
        while not hypervisor.vmm_gone:
            if hypervisor.may_block:
                await hypervisor.settled()
            try:
                message = uffd.read()
            except OSError as error:
                log.warning("userfaultfd_unreadable", error=str(error))
                break
            if message is None:
                if is_awake and uffd.restore_nonblocking():
                    await trio.sleep(SPURIOUS_WAKE_SECONDS)
                await trio.lowlevel.wait_readable(uffd)
                is_awake = True
                continue
            is_awake = False
            if isinstance(message, int):
                await self._fault(message)
            else:
                await self._remove(message)
            await give_way()
        self._memory.vmm_gone.set()

    async def _remove(self, uaddrs: UaddrRange) -> None:
        memory, notifier = self._memory, self._notifier
        part = memory.first_removed(uaddrs)
        memory.removed(part)
        notifier.invalidate(uaddrs, Source.USERFAULTFD)
        if part.end < uaddrs.end:
            notifier.reopen(uaddrs, Source.USERFAULTFD)  # until all is known, faults there wait
        self._uffd.forget_message()
        if part.end < uaddrs.end:
            try:
                await self._remove_rest(UaddrRange(start=part.end, end=uaddrs.end))
            finally:
                notifier.end(uaddrs, Source.USERFAULTFD)
        await self._wait_for_room()

    async def _remove_rest(self, uaddrs: UaddrRange) -> None:
        while uaddrs.page_count:
            await give_way()
            part = self._memory.first_removed(uaddrs)
            self._memory.removed(part)
            uaddrs = UaddrRange(start=part.end, end=uaddrs.end)

    async def _wait_for_room(self) -> None:
        """Block while what was given back is in as many pieces as there may be: a VMM that gives back more
        waits for its message to be read, and its guest with it."""
        while True:
            try:
                self._memory.require_room()
            except WireError as error:
                if not self.held_up:
                    self.held_up = f"the VMM has given back too many pieces: {error.message}"
                    log.warning("removals_held_up", error=error.message)
                await trio.sleep(ROOM_SECONDS)
            else:
                self.held_up = ""
                return

    async def _fault(self, page: int) -> None:
        began = self.last_fault_ns = perf_counter_ns()
        if self.first_fault_ns is None:
            self.first_fault_ns = began
        region = self._region
        if page not in region.uaddrs:
            found = next((region for region in self._regions if page in region.uaddrs), None)
            if found is None:
                log.error("fault_outside_regions", uaddr=f"{page << PAGE_SHIFT:#x}")
                return
            region = self._region = found
        gfn = page - region.uaddrs.start + region.gfns.start
        if self._owed and (owed := self._owed.get(gfn)) is not None:
            owed.again = True
        else:
            await self._decide(gfn, self._uffd.access, began)

    # ------------------------------------------------ deciding

    async def _decide(self, gfn: int, access: Access, began: int) -> None:
        """What can be decided in this step is; a task goes on with the rest."""
        match self._faults.lookup(gfn, access):
            case Region() as region if not self._hypervisor.may_block:
                fault = Fault(gfn, access, region)
                fault.spent[DECODE] = looked_up = perf_counter_ns() - began
                self._faults.stages.decode.record(looked_up)
                answer = await self._faults.handle_nowait(fault)
                if answer is None:
                    self._queue_up(gfn, access, began)
                else:
                    await self._act(answer, fault, began)
            case Mapping() if not self._hypervisor.may_block:
                await self._act(Answer.ALREADY_MAPPED, Fault(gfn, access, None), began)
            case _:
                self._queue_up(gfn, access, began)

    def _owe(self, gfn: int, access: Access, began: int) -> None:
        """From now on something goes on with this fault."""
        if not self._owed:
            self._idle = trio.Event()
        if gfn not in self._owed:
            self._owed[gfn] = _Owed(access, began)

    def _queue_up(self, gfn: int, access: Access, began: int) -> None:
        self._owe(gfn, access, began)
        self._queue.append(gfn)
        if self._tasks < TASKS:
            self._tasks += 1
            self._nursery.start_soon(self._work)

    async def _work(self) -> None:
        """Decide faults that must wait, one after the other."""
        while self._queue:
            gfn = self._queue.popleft()
            owed = self._owed[gfn]
            fault = Fault(gfn, owed.access, None)
            answer = await self._faults.handle(fault, _never)
            await self._act(answer, fault, owed.began)
        self._tasks -= 1

    async def _act(self, answer: Answer, fault: Fault, began: int) -> None:
        """See to it that the thread goes on that waits for the page, now or later."""
        if answer is Answer.ALREADY_MAPPED:
            answer = await self._bring_again(fault)
        self._note(answer, fault, began)
        if answer not in (Answer.MAPPED, Answer.ALREADY_MAPPED):
            self._try_later(answer, fault, began)
        elif self._owed and (owed := self._owed.pop(fault.gfn, None)) is not None:
            self._changing.seconds, self._failing.seconds = self._changing.first, self._failing.first
            if owed.again:
                self._hypervisor.wake(self._uaddrs_of(fault.gfn))
            if not self._owed:
                self._idle.set()

    async def _bring_again(self, fault: Fault) -> Answer:
        """The page was brought in since the thread missed it, as a rule."""
        mapping = self._faults.lookup(fault.gfn, fault.access)
        if not isinstance(mapping, Mapping) or self._woken.pop(fault.gfn, None) is mapping:
            return Answer.CONTENDED
        if len(self._woken) >= WOKEN:
            self._woken.clear()
        self._woken[fault.gfn] = mapping
        try:
            await self._hypervisor.bring_again(mapping, fault.gfn)
        except HypervisorError:
            return Answer.CONTENDED
        return Answer.ALREADY_MAPPED

    def _try_later(self, answer: Answer, fault: Fault, began: int) -> None:
        self._owe(fault.gfn, fault.access, began)
        if answer in (Answer.CONTENDED, Answer.INVALIDATING) and not self._memory.is_failing:
            self.retries += 1
            pause = self._changing
        else:
            pause = self._failing
        pause.gfns.append(fault.gfn)
        if not pause.is_on:
            pause.is_on = True
            self._nursery.start_soon(self._try_again, pause)

    async def _try_again(self, pause: _Pause) -> None:
        while pause.gfns:
            await trio.sleep(pause.seconds)
            pause.seconds = min(2 * pause.seconds, pause.most)
            gfns, pause.gfns = pause.gfns, []
            for gfn in gfns:
                owed = self._owed[gfn]
                await self._decide(gfn, owed.access, owed.began)
                await give_way()
        pause.is_on = False

    def _uaddrs_of(self, gfn: int) -> UaddrRange:
        page = GfnRange(start=gfn, end=gfn + 1)
        return next(region.uaddrs_of(page) for region in self._regions if gfn in region.gfns)

    def _note(self, answer: Answer, fault: Fault, began: int) -> None:
        self.answers[answer] += 1
        now = perf_counter_ns()
        if answer is Answer.MAPPED or answer is Answer.ALREADY_MAPPED:
            (self.latency.waited if fault.waited else self.latency.at_once).record(now - began)
        bus = self._event_bus
        if bus.intercepts_wanted:
            if (trace := bus.trace) is not None:
                trace.intercept(now, self.index, (fault.gfn, fault.access), answer, now - began, fault)
            if bus.subscribers_want_intercepts:
                bus.publish(
                    InterceptAnswered(
                        vp_index=self.index,
                        outcome=answer.outcome,
                        reason=answer.reason,
                        gfn=fault.gfn,
                        access=fault.access,
                    )
                )


def _never(_answer: Answer) -> None:
    """A fault of a restored guest is not interrupted."""
