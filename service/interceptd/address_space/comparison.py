"""Compares a guest's mappings with the current VMAs of its VMM.

Owns finding and invalidating changes without a userfaultfd event: shmat(SHM_REMAP), remap_file_pages and
mprotect. Must not know regions, how the process is queried, or how a mapping is revoked.
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

PIECES_PER_ROUND = 1024
"""A piece is a part of a mapping that one VMA backs, and costs at most one look-up, mostly in a worker
thread. An `invalidate` compares up to this many."""
PIECES_PER_PROBE = 256
"""Without being asked, a partition compares up to this many per second."""
PIECES_PER_QUESTION = 64
"""Few, because an abandoned question occupies its thread until the kernel has answered all of it."""
RETRIES = 8
"""Times that a difference is checked because announced changes overlapped the check."""
READ_WRITE = Access.READ | Access.WRITE


class Compared(NamedTuple):
    """Where a comparison stopped (a gfn), how many pieces it compared, and the mappings that differ."""

    end: int
    pieces: int
    differing: list[Mapping]


def compare(given: Iterable[Mapping], vma_at: Callable[[int], LiveVma | None], most: int) -> Compared:
    """Compare the `given` mappings, at least one and in order, with the VMAs, up to `most` pieces.

    Without a VMA the whole rest of the mapping differs, because the length of the hole is unknown. Neighbours
    in one VMA share a look-up.
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
    """Whether the VMA still has this frame at `page`, and the rights that the guest was given, without
    execute, which the region alone decides."""
    return Frame(vma.backing, vma.backing_page(page)) == frame and access & READ_WRITE in vma.access


Given = Callable[[GfnRange, int], list[Mapping]]
"""The guest's first mappings in these gfns, about so many, in order and sliced to the gfns."""
Compare = Callable[[list[Mapping], int], Awaitable[Compared]]
"""`compare` in a worker thread. May raise `Undecided`."""


class Comparison:
    """One per partition. `drain` reads what the kernel has reported."""

    def __init__(
        self, notifier: MmuNotifier, given: Given, compare: Compare, drain: Callable[[], Awaitable[None]]
    ) -> None:
        self._notifier = notifier
        self._given = given
        self._compare = compare
        self._drain = drain
        self._next = 0
        """The gfn at which the next round starts."""
        self._turn = trio.Lock()
        self._begun = 0
        self._completed = 0
        """The numbers of the last round begun and of the last one that `catch_up` completed."""

    async def round(self) -> None:
        """Compare `PIECES_PER_PROBE` pieces, from where the last round stopped, and invalidate what differs.

        May miss what is being mapped meanwhile; the next round finds it. Raises `Undecided`.
        """
        async with self._turn:
            await self._round(PIECES_PER_PROBE)

    async def catch_up(self) -> None:
        """Revoke from the guest every change made before the call, as far as one round reaches. Raises
        `Undecided`.

        Waits for the attempts in flight, which may have resolved before the change, and forgets what was
        learned before. One round serves every call made before it began.
        """
        wanted = self._begun + 1
        async with self._turn:
            if self._completed < wanted:
                await self._round(PIECES_PER_ROUND)
                self._completed = self._begun
        await self._notifier.wait_served()

    async def _round(self, most: int) -> None:
        self._begun += 1
        await self._notifier.outlive_what_was_learned()
        for gfns in (GfnRange(start=self._next, end=PAGE_LIMIT), GfnRange(start=0, end=self._next)):
            most = await self._compare_in(gfns, most)

    async def _compare_in(self, gfns: GfnRange, most: int) -> int:
        """Compare up to `most` pieces in `gfns`; returns how many are left for elsewhere."""
        while most and gfns.page_count and (given := self._given(gfns, PIECES_PER_QUESTION)):
            compared = await self._compare(given, min(most, PIECES_PER_QUESTION))
            for mapping in compared.differing:
                await self._report(mapping)
            most -= compared.pieces
            self._next = compared.end
            gfns = gfns.slice(compared.end, gfns.end)
        return most

    async def _report(self, differing: Mapping) -> None:
        """Invalidate what differs, except because of an announced change, which shows in the VMAs before it
        is revoked. (A munmap whose event is not sent yet counts as unannounced.)"""
        for _ in range(RETRIES):
            await self._notifier.wait_served()
            window = self._notifier.open_window(uaddrs_of(differing))
            try:
                given = self._given(differing.gfns, PIECES_PER_QUESTION)
                if not given:
                    return
                compared = await self._compare(given, PIECES_PER_QUESTION)
                await self._drain()
            finally:
                self._notifier.close_window(window)
            if window.stale:
                continue
            for mapping in compared.differing:
                self._notifier.invalidate(uaddrs_of(mapping), Source.COMPARISON)
            if compared.end == differing.end:
                return
            differing = differing.slice(compared.end, differing.end)
        self._notifier.invalidate(uaddrs_of(differing), Source.COMPARISON)


def uaddrs_of(mapping: Mapping) -> UaddrRange:
    """The VMM's pages behind it."""
    start = mapping.start_uaddr_page
    return UaddrRange(start=start, end=start + mapping.end - mapping.start)
