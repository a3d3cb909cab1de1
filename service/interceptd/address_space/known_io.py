"""A cache of which VMAs of a VMM are device memory.

Owns what a pass over smaps has learned, until an invalidation overlaps it. Pure except for a lock: a worker
thread learns while the trio thread forgets and reads. Must not know how smaps is read.
"""

from __future__ import annotations

import threading
from bisect import bisect_right

import msgspec
from msgspec.structs import replace

from intercept_protocol.addresses import PAGE_LIMIT, UaddrRange
from interceptd.address_space.live_vma import Identity, LiveVma
from interceptd.memory_budget import uncounted
from interceptd.pages.range_map import RangeMap

KNOWN_VMAS = 1 << 14
"""The most VMAs remembered, if its uid's memory has room for them; equal neighbours are merged. Beyond it, a
VMA that was learned before costs another pass."""
GONE_PIECES = 1024
"""Beyond this many disjoint forgotten pieces, if there is room, everything is forgotten."""


class KnownVma(msgspec.Struct, frozen=True, gc=False):
    """Pages [start, end) of one VMA identity, and whether they are VM_IO | VM_PFNMAP."""

    start: int
    end: int
    identity: Identity
    io: bool

    def continued_by(self, following: KnownVma) -> bool:
        return self.end == following.start and self.io is following.io and self.identity == following.identity


class KnownIo:
    """A pass learns in address order: `start_over`, then `read_on` and `learn` alternately."""

    def __init__(self) -> None:
        self.share = uncounted()
        """What bounds it, beside the numbers above."""
        self._lock = threading.Lock()
        self._starts: list[int] = []
        self._vmas: list[KnownVma] = []
        self._gone: RangeMap[UaddrRange] = RangeMap()

    def io_of(self, vma: LiveVma, page: int) -> bool | None:
        """Whether `vma`, which now covers the page, is device memory; None if unknown."""
        with self._lock:
            index = bisect_right(self._starts, page) - 1
            if index < 0 or self._gone.find(page) is not None:
                return None
            known = self._vmas[index]
            return known.io if page < known.end and known.identity == vma.identity else None

    def forget(self, uaddrs: UaddrRange) -> None:
        """`uaddrs` is changing: forget it, including what is being read at this moment."""
        with self._lock:
            gone = self._gone.find(uaddrs.start)
            if gone is not None and uaddrs.end <= gone.end:
                return
            self._gone.carve(uaddrs)
            self._gone.insert(uaddrs)
            if len(self._gone) > GONE_PIECES or not self._has_room():
                self._clear()
                self._gone = RangeMap()
                self._gone.insert(UaddrRange(start=0, end=PAGE_LIMIT))
                self._has_room()

    def start_over(self) -> None:
        """Forget everything for a new pass."""
        with self._lock:
            self._clear()
            self._gone = RangeMap()
            self._has_room()

    def read_on(self, page: int) -> None:
        """The pass continues at this page: what follows is read after earlier invalidations."""
        with self._lock:
            self._gone.carve(UaddrRange(start=page, end=PAGE_LIMIT))
            self._has_room()

    def learn(self, vmas: list[KnownVma]) -> None:
        """Remember what was read since the last `read_on`."""
        with self._lock:
            if not self._has_room(len(vmas)):
                self._clear()
            for vma in vmas:
                if self._vmas and self._vmas[-1].continued_by(vma):
                    self._vmas[-1] = replace(self._vmas[-1], end=vma.end)
                    continue
                while self._starts and vma.start <= self._starts[-1]:  # merged into `vma` meanwhile
                    del self._starts[-1], self._vmas[-1]
                if len(self._vmas) >= KNOWN_VMAS:
                    self._clear()
                self._starts.append(vma.start)
                self._vmas.append(vma)
            self._has_room()

    def close(self) -> None:
        """Nobody asks any more: give back the share."""
        with self._lock:
            self.share.resize(0)
            self.share = uncounted()

    def _clear(self) -> None:
        self._starts, self._vmas = [], []

    def _has_room(self, more: int = 0) -> bool:
        """Count what is remembered, and `more`; False if there is no room for that."""
        entries = len(self._vmas) + len(self._gone) + more
        return self.share.resize(entries)
