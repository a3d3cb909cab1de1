"""What is known of a VMM's VMAs: which are device memory, and which are not.

Owns what one pass over smaps has learned, until an invalidation overlaps it. Pure, but for a lock: a worker
thread learns while the trio thread forgets and asks. Must not know how smaps is read.
"""

from __future__ import annotations

import threading
from bisect import bisect_right

import msgspec
from msgspec.structs import replace

from intercept_protocol.addresses import PAGE_LIMIT, UaddrRange
from interceptd.address_space.live_vma import Identity, LiveVma
from interceptd.pages.range_map import RangeMap

KNOWN_VMAS = 1 << 16
"""VMAs that are remembered at most, the default of vm.max_map_count. Neighbours that are alike are one."""
GONE_PIECES = 1024
"""Beyond this many disjoint pieces that are not known any more, nothing is."""


class KnownVma(msgspec.Struct, frozen=True, gc=False):
    """Pages [start, end) of one identity, and whether they are VM_IO | VM_PFNMAP."""

    start: int
    end: int
    identity: Identity
    io: bool

    def continued_by(self, following: KnownVma) -> bool:
        return self.end == following.start and self.io is following.io and self.identity == following.identity


class KnownIo:
    """A pass learns in the order of the addresses: `start_over`, then `read_on` and `learn` by turns."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._starts: list[int] = []
        self._vmas: list[KnownVma] = []
        self._gone: RangeMap[UaddrRange] = RangeMap()

    def io_of(self, vma: LiveVma, page: int) -> bool | None:
        """Whether `vma`, which covers the page now, is device memory; None where that is not known."""
        with self._lock:
            index = bisect_right(self._starts, page) - 1
            if index < 0 or self._gone.find(page) is not None:
                return None
            known = self._vmas[index]
            return known.io if page < known.end and known.identity == vma.identity else None

    def forget(self, uaddrs: UaddrRange) -> None:
        """What is there is changing. Also what is being read just now will not be remembered."""
        with self._lock:
            gone = self._gone.find(uaddrs.start)
            if gone is not None and uaddrs.end <= gone.end:
                return
            self._gone.carve(uaddrs)
            self._gone.insert(uaddrs)
            if len(self._gone) > GONE_PIECES:
                self._gone = RangeMap()
                self._gone.insert(UaddrRange(start=0, end=PAGE_LIMIT))

    def start_over(self) -> None:
        """A new pass begins: nothing is known."""
        with self._lock:
            self._clear()
            self._gone = RangeMap()

    def read_on(self, page: int) -> None:
        """The pass goes on at this page: nothing from there on was read before it was invalidated."""
        with self._lock:
            self._gone.carve(UaddrRange(start=page, end=PAGE_LIMIT))

    def learn(self, vmas: list[KnownVma]) -> None:
        """What was just read, since the last `read_on`."""
        with self._lock:
            for vma in vmas:
                if self._vmas and self._vmas[-1].continued_by(vma):
                    self._vmas[-1] = replace(self._vmas[-1], end=vma.end)
                    continue
                while self._starts and vma.start <= self._starts[-1]:  # they were merged meanwhile
                    del self._starts[-1], self._vmas[-1]
                if len(self._vmas) >= KNOWN_VMAS:
                    self._clear()
                self._starts.append(vma.start)
                self._vmas.append(vma)

    def _clear(self) -> None:
        self._starts, self._vmas = [], []
