"""What a guest was given, held against the VMAs that its VMM has now.

Owns finding and reporting what changed without a userfaultfd event: by shmat(SHM_REMAP), remap_file_pages and
mprotect. Must not know regions, how the process is asked, or how a mapping is taken away.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from typing import NamedTuple

import trio

from intercept_protocol.addresses import PAGE_LIMIT, GfnRange, UaddrRange
from intercept_protocol.outcomes import Access
from interceptd.address_space.live_vma import LiveVma
from interceptd.mmu_notifier import MmuNotifier
from interceptd.pages.mapping import Frame, Mapping
from interceptd.telemetry.counters import Source

PIECES_A_ROUND = 1024
"""A piece is a part of a mapping that one VMA backs, and costs at most one look-up. An `invalidate` compares
up to this many, which takes up to 8 ms of CPU, most of it a worker thread's."""
PIECES_A_PROBE = 256
"""Without being asked, a partition compares up to this many per second."""
PIECES_A_QUESTION = 64
"""A question that is given up goes on until the kernel has answered it: it is a short one."""
LOOKS = 8
"""Times that a difference is looked at again because announced changes overlapped the look."""
READ_WRITE = Access.READ | Access.WRITE


class Compared(NamedTuple):
    """How far a look came, in gfns and in pieces, and what it found."""

    end: int
    pieces: int
    differing: list[Mapping]


def compare(given: Iterable[Mapping], vma_at: Callable[[int], LiveVma | None], most: int) -> Compared:
    """Hold `given` mappings, at least one and in order, against the VMAs, up to `most` pieces.

    Where there is no VMA all the rest of the mapping differs: how far the hole reaches is not known.
    Neighbours in one VMA share a look-up.
    """
    pieces, end, differing = 0, 0, list[Mapping]()
    vma: LiveVma | None = None
    for mapping in given:
        end = mapping.start
        while end < mapping.end:
            if pieces == most:
                return Compared(end, pieces, differing)
            start, page = end, mapping.start_uaddr_page + end - mapping.start
            if vma is None or not vma.start <= page < vma.end:
                vma = vma_at(page)
            end = mapping.end if vma is None else min(mapping.end, start + vma.end - page)
            pieces += 1
            if vma is None or not _backs(vma, page, mapping.frame_at(start), mapping.access):
                differing.append(mapping.slice(start, end))
    return Compared(end, pieces, differing)


def _backs(vma: LiveVma, page: int, frame: Frame | None, access: Access) -> bool:
    """Whether the VMA still has this frame at `page`, and the rights that the guest was given. Execution is
    the region's to allow."""
    return Frame(vma.backing, vma.backing_page(page)) == frame and access & READ_WRITE in vma.access


Given = Callable[[GfnRange, int], list[Mapping]]
"""What the guest has in these gfns, in order and cut to them: some of the first mappings, about as many."""
Look = Callable[[list[Mapping], int], Awaitable[Compared]]
"""`compare`, in a worker thread. May raise `Undecided`."""


class Comparison:
    """One partition's. `drain` takes in, synchronously, what the kernel has reported."""

    def __init__(self, notifier: MmuNotifier, given: Given, look: Look, drain: Callable[[], None]) -> None:
        self._notifier = notifier
        self._given = given
        self._look = look
        self._drain = drain
        self._next = 0
        """The gfn at which the next round begins."""
        self._turn = trio.Lock()
        self._begun = 0
        self._completed = 0
        """The number of the last round that was begun, and of the last one that `catch_up` completed."""

    async def round(self) -> None:
        """Compare `PIECES_A_PROBE` pieces, from where the last round stopped, and invalidate what differs.

        What is being mapped meanwhile may be missed; the next round finds it. Raises `Undecided`.
        """
        async with self._turn:
            await self._round(PIECES_A_PROBE)

    async def catch_up(self) -> None:
        """Have every change that was made before the call taken away from the guest, of as many pieces as a
        round compares. Raises `Undecided`.

        Attempts in flight may have looked before the change, so they end first. One round serves all who
        asked before it began.
        """
        wanted = self._begun + 1
        async with self._turn:
            if self._completed < wanted:
                await self._round(PIECES_A_ROUND)
                self._completed = self._begun
        await self._notifier.wait_served()

    async def _round(self, most: int) -> None:
        self._begun += 1
        await self._notifier.wait_windows_closed()
        for gfns in (GfnRange(start=self._next, end=PAGE_LIMIT), GfnRange(start=0, end=self._next)):
            most = await self._go_over(gfns, most)

    async def _go_over(self, gfns: GfnRange, most: int) -> int:
        """Compare what is given in `gfns`, `most` pieces of it; returns how many may follow elsewhere."""
        while most and gfns.page_count and (given := self._given(gfns, PIECES_A_QUESTION)):
            compared = await self._look(given, min(most, PIECES_A_QUESTION))
            for mapping in compared.differing:
                await self._report(mapping)
            most -= compared.pieces
            self._next = compared.end
            gfns = gfns.slice(compared.end, gfns.end)
        return most

    async def _report(self, differing: Mapping) -> None:
        """Invalidate what differs; but not what differs because of an announced change, which shows in the
        VMAs before it is taken away. (A munmap whose event is not sent yet is taken for one without.)"""
        for _ in range(LOOKS):
            await self._notifier.wait_served()
            window = self._notifier.open_window(_uaddrs(differing))
            try:
                given = self._given(differing.gfns, PIECES_A_QUESTION)
                if not given:
                    return
                compared = await self._look(given, PIECES_A_QUESTION)
                self._drain()
            finally:
                self._notifier.close_window(window)
            if window.stale:
                continue
            for mapping in compared.differing:
                self._notifier.invalidate(_uaddrs(mapping), Source.COMPARISON)
            if compared.end == differing.end:
                return
            differing = differing.slice(compared.end, differing.end)
        self._notifier.invalidate(_uaddrs(differing), Source.COMPARISON)


def _uaddrs(mapping: Mapping) -> UaddrRange:
    start = mapping.start_uaddr_page
    return UaddrRange(start=start, end=start + mapping.end - mapping.start)
