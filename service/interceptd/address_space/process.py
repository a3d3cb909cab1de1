"""The process address space: the VMM's real mappings, asked of the kernel.

Owns the questions, the worker threads that ask them, and the rule that nothing is mapped blind: what is
neither watched by the userfaultfd nor promised to be announced is not backed. Must not know regions or gfns.

The VMM controls its own mmap lock, so no question is asked on the trio thread: each runs in a worker, of
which a partition has few, and is given up after a deadline (the worker ends when the kernel answers it). The
VMM's own calls have workers of their own: faults of 64 VPs do not keep a region from being added.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import NamedTuple, TypeVar

import trio

from intercept_protocol.addresses import UaddrRange
from interceptd.address_space import Caller, KindUnknown, Undecided, Unresolved
from interceptd.address_space.attachment import Attachment
from interceptd.address_space.comparison import Compared, Comparison, Given, compare
from interceptd.address_space.handover import Handover
from interceptd.address_space.live_vma import LiveVma
from interceptd.address_space.obstacle_log import ObstacleLog
from interceptd.address_space.proc_text import MmGone
from interceptd.address_space.procmaps import ProcMaps
from interceptd.address_space.refusals import Call, Cause, Permanence, cause_of, error_name
from interceptd.address_space.smaps import Smaps
from interceptd.address_space.unmap_watch import UnmapWatch
from interceptd.address_space.userfaultfd import Userfaultfd
from interceptd.address_space.workers import Workers
from interceptd.connections.peer import Pidfd
from interceptd.mmu_notifier import MmuNotifier
from interceptd.pages.mapping import Extent, Frame, Mapping

WORKERS = {Caller.GUEST: 4, Caller.VMM: 2}
"""Threads that may wait for one VMM's mmap lock at a time. A VMM makes one call at a time; the second thread
is for the probe."""
LOOKS = 8
"""Times that one `resolve` looks again at a VMA that changes under it."""
PASSES = 3
"""Times that one question reads smaps for a VMA that is not where it was a moment ago."""
PAUSE_SECONDS = 0.02
"""Before a fault is told RETRY because of what passes. A VP that asks again at once, for ever, asks 50 times
a second and not thousands; and what passes soon, as a userfaultfd that is being closed, has by then."""
PROBE_SECONDS = 1.0
"""Between questions whether the mm is still there: the kernel tells nobody of an exec."""
T = TypeVar("T")


class ProcessAddressSpace:
    """See `AddressSpace`. Nothing is backed until `attach`.

    `given` tells what the guest has of this memory.
    `timeout` bounds each question of the VMM's own calls, in seconds; a fault's are bounded by its intercept.
    `name` tells people whose threads these are.
    """

    def __init__(
        self, notifier: MmuNotifier, given: Given, timeout: float, vmm: Pidfd | None, name: str
    ) -> None:
        self._notifier = notifier
        self._given = given
        self._timeout = timeout
        self._vmm = vmm
        self._workers = {
            caller: Workers(most, f"{caller.value} of {name}") for caller, most in WORKERS.items()
        }
        self._attachment: Attachment | None = None
        self._watch: UnmapWatch | None = None
        self._comparison: Comparison | None = None
        self._attached = trio.Event()
        self._gone = trio.Event()
        self._obstacles = ObstacleLog()

    @property
    def vma_count(self) -> int:
        """None of our own: the kernel keeps them."""
        return 0

    may_block = True

    async def take(self, handover: Handover) -> None:
        """`attach` what a VMM handed over. Raises what either does."""
        workers = self._workers[Caller.VMM]
        try:
            await self.attach(await handover.attachment(self._timeout, workers))
        except BaseException:
            workers.end_idle()  # without memory there is nothing to ask, and nobody trims
            raise

    async def attach(self, attachment: Attachment) -> None:
        """Take over the descriptors and begin to watch. Raises `Undecided`, and closes them, if the process
        does not answer or is gone."""
        assert self._attachment is None, "attach once"
        try:
            await self._ask(attachment, partial(attachment.maps.vma_at, 0))
        except BaseException:
            attachment.close()
            raise
        self._attachment = attachment
        if attachment.smaps is not None:
            self._notifier.listen(attachment.smaps.forget)
        if attachment.userfaultfd is not None:
            self._watch = UnmapWatch(attachment.userfaultfd, self._notifier)
            self._comparison = Comparison(
                self._notifier, self._given, partial(self._compare, attachment), self._watch.drain
            )
        self._attached.set()

    async def resolve(
        self, page: int, window: UaddrRange, region: UaddrRange, caller: Caller = Caller.GUEST
    ) -> Extent | None:
        """See `AddressSpace.resolve`. `io` is known of what is watched, and of what was read in smaps and not
        invalidated since."""
        attachment = self._attachment
        if attachment is None:
            return None
        found = await self._ask(attachment, partial(_look, attachment, page, window, region), caller)
        if self._watch is not None:
            self._watch.drain()  # what was unmapped before the last look is known before the commit
        if found is None:
            return None
        frame = Frame(found.vma.backing, found.vma.backing_page(found.uaddrs.start))
        io = False if found.watched else _known_io(attachment.smaps, found.vma, page)
        return Extent(found.uaddrs, frame, found.vma.access, io)

    async def is_io(self, page: int, caller: Caller = Caller.GUEST) -> bool | None:
        """See `AddressSpace.is_io`."""
        attachment = self._attachment
        if attachment is None:
            raise KindUnknown("attach_memory comes first")
        if attachment.smaps is None:
            raise KindUnknown("smaps was not handed over and may not be opened: state the kind")
        question = partial(_read_io, attachment.maps, attachment.smaps, page)
        return await self._ask(attachment, question, caller)

    async def catch_up(self) -> None:
        """Where memory is watched, take in the changes of which the kernel reported nothing. Raises
        `Undecided` if the process does not answer; if it is gone, its partition ends anyway."""
        if self._comparison is None:
            return
        try:
            await self._comparison.catch_up()
        except Undecided:
            if not self._gone.is_set():
                raise

    @property
    def busy_workers(self) -> int:
        """Threads that ask the kernel now; one that was given up is busy until the kernel answers it."""
        return sum(workers.busy for workers in self._workers.values())

    @property
    def attached(self) -> bool:
        return self._attachment is not None

    async def run(self) -> None:
        """Watch the process; returns when its mm is gone, or it exited before it handed that over."""
        async with trio.open_nursery() as nursery:
            if self._vmm is not None:
                nursery.start_soon(self._look_at_exit, self._vmm)
            nursery.start_soon(self._watch_attached)
            await self._gone.wait()
            nursery.cancel_scope.cancel()

    def close(self) -> None:
        """Let go of the descriptors and the threads; nothing is asked any more."""
        for workers in self._workers.values():
            workers.close()
        if self._attachment is not None:
            self._attachment.close()
            self._attachment = None
        if self._vmm is not None:
            self._vmm.close()

    async def _watch_attached(self) -> None:
        await self._attached.wait()
        async with trio.open_nursery() as nursery:
            if self._watch is not None:
                nursery.start_soon(self._watch_unmaps, self._watch)
            nursery.start_soon(self._probe)

    async def _watch_unmaps(self, watch: UnmapWatch) -> None:
        """When no event can be read any more, nothing may stay mapped on the strength of them."""
        await watch.run()
        self._gone.set()

    async def _probe(self) -> None:
        """Ask now and then: after an exec nothing else tells, and a child may keep the socket open. Nor does
        anything tell of some changes of the mappings."""
        attachment = self._attachment
        assert attachment is not None, "attached before it is run"
        while True:
            await trio.sleep(PROBE_SECONDS)
            for workers in self._workers.values():
                workers.trim()
            with suppress(Undecided):  # busy is alive; gone is seen by `_ask`
                await self._ask(attachment, partial(attachment.maps.vma_at, 0))
                if self._comparison is not None:
                    await self._comparison.round()

    async def _compare(self, attachment: Attachment, given: list[Mapping], most: int) -> Compared:
        compared = await self._ask(attachment, lambda: compare(given, attachment.maps.view(), most))
        assert compared is not None, "a comparison always has a result"
        return compared

    async def _look_at_exit(self, vmm: Pidfd) -> None:
        """Once the process that connected is gone, ask at once: it need not be the one whose memory it is. A
        process that is gone hands nothing over any more, whoever holds its connection open."""
        await trio.lowlevel.wait_readable(vmm)
        if self._attachment is None:
            self._gone.set()
            return
        with suppress(Undecided):
            await self._ask(self._attachment, partial(self._attachment.maps.vma_at, 0))

    async def _ask(
        self, attachment: Attachment, question: Callable[[], T | Unresolved], caller: Caller = Caller.VMM
    ) -> T | None:
        """Put a question to the kernel in a worker thread; None where it is decided that there is nothing.

        Raises `Undecided` for what passes, to a fault after a pause; when the mm is gone; and for the VMM's
        own calls at the deadline."""

        def ask() -> T | Unresolved:
            with attachment.in_use():
                return question()

        workers = self._workers[caller]
        try:
            if caller is Caller.GUEST:  # a deadline of our own would take 6 us, and never come first
                answer = await workers.ask(ask)
            else:
                with trio.fail_after(self._timeout):
                    answer = await workers.ask(ask)
        except trio.TooSlowError:
            raise Undecided.because(Cause.NO_ANSWER) from None
        except MmGone:
            if attachment is self._attachment:  # and not one that is being refused
                self._gone.set()
            raise Undecided.because(Cause.MM_GONE) from None
        except OSError as error:  # none that the questions make anything of
            obstacle = Undecided.because(Cause.OTHER, error_name(error))
        except Undecided as error:
            obstacle = error
        else:
            if not isinstance(answer, Unresolved):
                return answer
            if answer.cause.permanence is Permanence.PERMANENT:
                return None
            obstacle = Undecided.because(answer.cause, answer.detail)
        if caller is Caller.GUEST:
            self._obstacles.tell(obstacle)
            await trio.sleep(PAUSE_SECONDS)
        raise obstacle


def _known_io(smaps: Smaps | None, vma: LiveVma, page: int) -> bool | None:
    return None if smaps is None else smaps.known(vma, page)


# ------------------------------------------------ in worker threads: no trio here


class Found(NamedTuple):
    """A VMA and the part of it that may be mapped.

    What a userfaultfd watches is anonymous memory, shmem or hugetlb (vma_can_userfault(), without WP_ASYNC):
    none of them is VM_IO or VM_PFNMAP.
    """

    vma: LiveVma
    uaddrs: UaddrRange
    watched: bool


def _look(attachment: Attachment, page: int, window: UaddrRange, region: UaddrRange) -> Found | Unresolved:
    """The VMA at `page` and the part of `window` that it backs, watched or promised.

    Query, register, query again: a VMA that took the place of the first before it was registered is seen by
    the second look, and one that did so afterwards is reported as an unmap of what was registered. A refusal
    counts only if the second look finds all there that was to be registered: it is not about something else.
    """
    for _ in range(LOOKS):
        vma = attachment.maps.vma_at(page)
        if vma is None:
            return Unresolved(Cause.NO_VMA)
        if attachment.userfaultfd is None:
            if not attachment.promised:
                return Unresolved(Cause.UNANNOUNCED)
            return Found(vma, _overlap(vma, window), watched=False)
        part = vma.whole_units(_overlap(vma, region))  # of hugetlb memory the kernel registers nothing less
        refusal = _register(attachment.userfaultfd, part)
        again = attachment.maps.vma_at(page)
        if again is None or not again.continues(vma):
            continue
        if refusal is None or attachment.promised:
            # registering a part splits the VMA, and only what was registered is watched
            backed = _overlap(again, window).clip(part)
            assert backed is not None, "the page lies in all"
            return Found(again, backed, watched=refusal is None)
        if again.covers(part):
            return refusal
    return Unresolved(Cause.CHANGING)


def _register(userfaultfd: Userfaultfd, uaddrs: UaddrRange) -> Unresolved | None:
    """Why it is not watched now; None if it is."""
    try:
        userfaultfd.register(uaddrs)
    except OSError as error:
        return Unresolved(cause_of(Call.UFFDIO_REGISTER, error), f"UFFDIO_REGISTER: {error_name(error)}")
    return None


def _read_io(maps: ProcMaps, smaps: Smaps, page: int) -> bool | Unresolved:
    """Whether the VMA at `page` is device memory. A VMA whose record is not found is there all the same: it
    changed, or the text was torn."""
    for _ in range(PASSES):
        vma = maps.vma_at(page)
        if vma is None:
            return Unresolved(Cause.NO_VMA)
        try:
            io = smaps.read(vma, page)
        except MmGone:
            maps.vma_at(page)  # raises it too if the mm is gone, and not only the thread that opened smaps
            raise KindUnknown("smaps reads nothing more: the thread that opened it has ended") from None
        if io is not None:
            return io
    return Unresolved(Cause.NO_RECORD)


def _overlap(vma: LiveVma, uaddrs: UaddrRange) -> UaddrRange:
    overlap = UaddrRange(start=vma.start, end=vma.end).clip(uaddrs)
    assert overlap is not None, "the page lies in both"
    return overlap
