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
from typing import TypeVar

import trio

from intercept_protocol.addresses import UaddrRange
from interceptd.address_space import Asker, Undecided
from interceptd.address_space.attachment import Attachment
from interceptd.address_space.comparison import Compared, Comparison, Given, compare
from interceptd.address_space.handover import Handover
from interceptd.address_space.procmaps import LiveVma, MmGone, read_all
from interceptd.address_space.smaps import is_io
from interceptd.address_space.workers import Workers
from interceptd.mapping import Extent, Frame, Mapping
from interceptd.mmu_notifier import MmuNotifier
from interceptd.peer import Pidfd
from interceptd.unmap_watch import UnmapWatch

WORKERS = {Asker.GUEST: 4, Asker.VMM: 2}
"""Threads that may wait for one VMM's mmap lock at a time. A VMM makes one call at a time; the second thread
is for the probe."""
LOOKS = 8
"""Times that one `resolve` looks again at a VMA that changes under it."""
KNOWN_VMAS = 4096
"""VMAs whose smaps flags are remembered at most."""
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
        self._workers = {asker: Workers(most, f"{asker.value} of {name}") for asker, most in WORKERS.items()}
        self._attachment: Attachment | None = None
        self._watch: UnmapWatch | None = None
        self._comparison: Comparison | None = None
        self._attached = trio.Event()
        self._gone = trio.Event()
        self._io: dict[tuple[object, ...], bool] = {}

    @property
    def vma_count(self) -> int:
        """None of our own: the kernel keeps them."""
        return 0

    may_block = True

    async def take(self, handover: Handover) -> None:
        """`attach` what a VMM handed over. Raises what either does."""
        workers = self._workers[Asker.VMM]
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
        if attachment.userfaultfd is not None:
            self._watch = UnmapWatch(attachment.userfaultfd, self._notifier)
            self._comparison = Comparison(
                self._notifier, self._given, partial(self._compare, attachment), self._watch.drain
            )
        self._attached.set()

    async def resolve(
        self, page: int, window: UaddrRange, region: UaddrRange, asker: Asker = Asker.GUEST
    ) -> Extent | None:
        """See `AddressSpace.resolve`. `io` is known where `is_io` was asked of the same VMA before."""
        if self._attachment is None:
            return None
        found = await self._ask(
            self._attachment, partial(_look, self._attachment, page, window, region), asker
        )
        if self._watch is not None:
            self._watch.drain()  # what was unmapped before the last look is known before the commit
        if found is None:
            return None
        vma, uaddrs = found
        frame = Frame(vma.backing, vma.backing_page(uaddrs.start))
        return Extent(uaddrs, frame, vma.access, self._io.get(vma.identity))

    async def is_io(self, page: int, asker: Asker = Asker.GUEST) -> bool | None:
        """See `AddressSpace.is_io`. Raises `Undecided` also where there is no smaps to read it from."""
        attachment = self._attachment
        if attachment is None:
            raise Undecided("attach_memory comes first")
        if attachment.smaps is None:
            raise Undecided("smaps was not handed over and may not be opened: state the kind")
        found = await self._ask(attachment, partial(_read_flags, attachment, attachment.smaps, page), asker)
        if found is None:
            return None
        vma, io = found
        if len(self._io) >= KNOWN_VMAS:
            self._io.clear()
        self._io[vma.identity] = io
        return io

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
        """Watch the process; returns when its mm is gone."""
        await self._attached.wait()
        async with trio.open_nursery() as nursery:
            if self._watch is not None:
                nursery.start_soon(self._watch_unmaps, self._watch)
            nursery.start_soon(self._probe)
            if self._vmm is not None:
                nursery.start_soon(self._probe_at_exit, self._vmm)
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
        return await self._ask(attachment, lambda: compare(given, attachment.maps.view(), most))

    async def _probe_at_exit(self, vmm: Pidfd) -> None:
        """Ask as soon as the process that connected is gone: it need not be the one whose memory it is."""
        assert self._attachment is not None, "attached before it is run"
        await trio.lowlevel.wait_readable(vmm)
        with suppress(Undecided):
            await self._ask(self._attachment, partial(self._attachment.maps.vma_at, 0))

    async def _ask(self, attachment: Attachment, question: Callable[[], T], asker: Asker = Asker.VMM) -> T:
        """Put a question to the kernel in a worker thread.

        Raises `Undecided` when the mm is gone, and for the VMM's own calls at the deadline."""

        def ask() -> T:
            with attachment.in_use():
                return question()

        workers = self._workers[asker]
        try:
            if asker is Asker.GUEST:  # a deadline of our own would take 6 us, and never come first
                return await workers.ask(ask)
            with trio.fail_after(self._timeout):
                return await workers.ask(ask)
        except trio.TooSlowError:
            raise Undecided("the process does not answer: its mmap lock is held") from None
        except MmGone:
            if attachment is self._attachment:  # and not one that is being refused
                self._gone.set()
            raise Undecided("the process has exited or called exec") from None


# ------------------------------------------------ in worker threads: no trio here


def _look(
    attachment: Attachment, page: int, window: UaddrRange, region: UaddrRange
) -> tuple[LiveVma, UaddrRange] | None:
    """The VMA at `page` and the part of `window` that it backs, watched or promised.

    Query, register, query again: a VMA that took the place of the first before it was registered is seen by
    the second look, and one that did so afterwards is reported as an unmap of what was registered.
    """
    for _ in range(LOOKS):
        vma = attachment.maps.vma_at(page)
        if vma is None:
            return None
        part = _overlap(vma, region)
        if attachment.userfaultfd is None:
            return (vma, _overlap(vma, window)) if attachment.promised else None
        watched = attachment.userfaultfd.register(part)
        again = attachment.maps.vma_at(page)
        if again is not None and again.continues(vma):
            # registering a part splits the VMA, and only what was registered is watched
            backed = _overlap(again, window).clip(part)
            assert backed is not None, "the page lies in all"
            return (again, backed) if watched or attachment.promised else None
    raise Undecided("the VMA changed at every look")


def _read_flags(attachment: Attachment, smaps: int, page: int) -> tuple[LiveVma, bool] | None:
    try:
        text = read_all(smaps)
    except MmGone:
        attachment.maps.vma_at(page)  # raises it as well where the mm is gone, and not just a thread
        raise Undecided("smaps reads nothing more: the thread that opened it has ended") from None
    io = is_io(text, page)
    vma = attachment.maps.vma_at(page)
    return None if io is None or vma is None else (vma, io)


def _overlap(vma: LiveVma, uaddrs: UaddrRange) -> UaddrRange:
    overlap = UaddrRange(vma.start, vma.end).clip(uaddrs)
    assert overlap is not None, "the page lies in both"
    return overlap
