"""The declared address space: the VMM declares its VMAs and their host pages.

Owns the VMA table; must not know who depends on it. `map_vma` and `map_vmas` are one synchronous step;
`unmap_vma` and `protect_vma` run under an open invalidation.
"""

from __future__ import annotations

import errno
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

import msgspec
import trio
from msgspec.structs import replace

from intercept_protocol.addresses import PAGE_SHIFT, PageRange, UaddrRange
from intercept_protocol.elements import about_element
from intercept_protocol.errors import WireError
from intercept_protocol.messages import MemoryWatch
from intercept_protocol.outcomes import Access
from interceptd.address_space import Caller
from interceptd.address_space.refusals import Cause
from interceptd.pages.counted_range_map import CountedRangeMap
from interceptd.pages.mapping import HOST_BACKING, Extent, Frame
from interceptd.pages.range_map import RangeMap
from interceptd.quota import Quota
from interceptd.scheduling.time_share import give_way, give_way_shielded
from interceptd.telemetry.trace import Trace

VMAS_PER_PART = 64
"""VMAs that a long edit processes before it looks at the time."""


class Vma(msgspec.Struct, frozen=True, gc=False):
    """Pages [start, end) of the VMM, backed by contiguous host pages from `start_pfn`."""

    start: int
    end: int
    start_pfn: int
    access: Access
    io: bool

    def slice(self, start: int, end: int) -> Vma:
        return replace(self, start=start, end=end, start_pfn=self.start_pfn + start - self.start)


class DeclaredAddressSpace:
    """See `AddressSpace`. Never blocks. `quota` counts the VMAs of the uid."""

    def __init__(self, vma_limit: Callable[[], int], quota: Quota) -> None:
        self._vma_limit = vma_limit
        self._quota = quota
        self._vmas: CountedRangeMap[Vma] = CountedRangeMap(quota)
        self.unresolved: Counter[Cause] = Counter()
        """Empty: what is not declared is not there."""
        self.trace: Trace | None = None

    @property
    def vma_count(self) -> int:
        return len(self._vmas)

    may_block = False

    watch = MemoryWatch.DECLARED

    userfaultfd_errno = None

    def drain_nowait(self) -> bool:
        """True: every change is announced when it is made."""
        return True

    async def resolve(
        self,
        page: int,
        window: UaddrRange,
        region: UaddrRange,  # noqa: ARG002 - for address spaces that watch VMAs
        caller: Caller = Caller.GUEST,  # noqa: ARG002 - for address spaces that may block
    ) -> Extent | None:
        """See `AddressSpace.resolve`."""
        vma = self._vmas.find(page)
        if vma is None:
            return None
        backed = vma.slice(max(vma.start, window.start), min(vma.end, window.end))
        uaddrs = UaddrRange(start=backed.start, end=backed.end)
        whole = UaddrRange(start=vma.start, end=vma.end)
        return Extent(uaddrs, Frame(HOST_BACKING, backed.start_pfn), backed.access, backed.io, whole)

    async def run(self) -> None:
        """Never returns: declared memory lasts as long as its VMM's connection."""
        await trio.sleep_forever()

    def close(self) -> None:
        """Does nothing: there are no descriptors."""

    async def discard(self) -> None:
        """Free the VMAs of an ended partition, and let others run meanwhile."""
        while self._vmas.drop_some():
            await give_way_shielded()

    async def is_io(self, page: int, caller: Caller = Caller.GUEST) -> bool | None:  # noqa: ARG002 - as above
        vma = self.vma_at(page)
        return None if vma is None else vma.io

    def take_over(self, vmas: RangeMap[Vma]) -> None:
        """Have the VMAs that a predecessor recorded, whatever the limits are now."""
        self._vmas.take_over(vmas)

    def vma_at(self, page: int) -> Vma | None:
        return self._vmas.find(page)

    def first_vmas(self, count: int, start_page: int = 0) -> list[Vma]:
        """Up to `count` VMAs that start at `start_page` or behind it, in order."""
        return self._vmas.starting_from(start_page, count)

    def map_vma(self, vma: Vma) -> None:
        """Raises ENOSPC at the limit, EEXIST over another VMA."""
        self._require_room(1)
        self._insert(vma)
        self._note_mapped(vma)

    def map_vmas(self, vmas: Sequence[Vma]) -> None:
        """All of them, or none: raises ENOSPC without room for all, and EEXIST that says which overlaps
        another VMA, or one before it."""
        self._require_room(len(vmas))
        mapped = 0
        try:
            for vma in vmas:
                self._insert(vma)
                mapped += 1
        except WireError:
            for vma in vmas[:mapped]:
                self._vmas.carve(vma)
            with about_element("vmas", mapped):
                raise
        for vma in vmas:
            self._note_mapped(vma)

    def _note_mapped(self, vma: Vma) -> None:
        if self.trace is not None:
            self.trace.vma_mapped(vma.start, vma.end, vma.start_pfn, vma.access, vma.io)

    def _insert(self, vma: Vma) -> None:
        if not self._vmas.insert_if_free(vma):
            overlapped = self._vmas.first(vma)
            assert overlapped is not None, "it overlaps one"
            raise WireError(
                errno.EEXIST,
                f"VMA {_uaddrs(vma)} overlaps {_uaddrs(overlapped)}",
                start_uaddr=overlapped.start << PAGE_SHIFT,
                page_count=overlapped.end - overlapped.start,
            )

    async def unmap_vma(self, uaddrs: UaddrRange) -> None:
        """Remove everything in `uaddrs`, which may hold no VMA or parts of several.

        The caller must hold an open invalidation of `uaddrs`: a long edit yields, and no attempt may resolve
        there meanwhile. Raises ENOSPC, and changes nothing, if splitting a VMA would exceed the limit.
        """
        self._require_room(self._cuts(uaddrs) - len(self._vmas.overlapping(self._vmas.head(uaddrs, 2))))
        if self.trace is not None:
            self.trace.vma_unmapped(uaddrs.start, uaddrs.end)
        for part in self._parts(uaddrs):
            self._vmas.carve(part)
            if part.end < uaddrs.end:
                await give_way()

    async def protect_vma(self, uaddrs: UaddrRange, access: Access) -> None:
        """Set the rights of everything in `uaddrs`. Otherwise like `unmap_vma`."""
        self._require_room(self._cuts(uaddrs))
        if self.trace is not None:
            self.trace.vma_protected(uaddrs.start, uaddrs.end, access)
        for part in self._parts(uaddrs):
            for vma in self._vmas.carve(part):
                self._vmas.insert(replace(vma, access=access))
            if part.end < uaddrs.end:
                await give_way()

    def _parts(self, uaddrs: UaddrRange) -> Iterator[PageRange]:
        """`uaddrs` in parts in each of which at most `VMAS_PER_PART` VMAs start."""
        rest: PageRange = uaddrs
        while rest.page_count:
            part = self._vmas.head(rest, VMAS_PER_PART)
            yield part
            rest = rest.slice(part.end, rest.end)

    def _cuts(self, uaddrs: UaddrRange) -> int:
        """How many ends of `uaddrs` split a VMA."""
        first, last = self._vmas.find(uaddrs.start), self._vmas.find(uaddrs.end - 1)
        at_start = first is not None and first.start < uaddrs.start
        at_end = last is not None and uaddrs.end < last.end
        return at_start + at_end

    def _require_room(self, more: int) -> None:
        if more <= 0:  # what exceeds a lowered limit stays, and may be given back
            return
        if len(self._vmas) + more > (limit := self._vma_limit()):
            raise WireError(errno.ENOSPC, f"a partition may have {limit} VMAs", limit="vmas_per_partition")
        self._quota.require(more)


def _uaddrs(vma: Vma) -> UaddrRange:
    return UaddrRange(start=vma.start, end=vma.end)
