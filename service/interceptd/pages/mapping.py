"""The frame behind a guest page, and how the guest may access it.

Owns frames, extents and mappings: plain values that can be sliced. Must not know who made them.
"""

from __future__ import annotations

from enum import Enum

import msgspec
from msgspec.structs import replace

from intercept_protocol.addresses import GfnRange, UaddrRange
from intercept_protocol.outcomes import Access
from interceptd.pages.range_map import RangeMap


class Frame(msgspec.Struct, frozen=True, gc=False):
    """One page of a backing: ("host", pfn), or for live memory a file and its page, or an anonymous page.

    The backing is the identity of the frame, not its current location: see "What a frame is" in
    ARCHITECTURE.md.
    """

    backing: str
    page: int

    def ahead(self, pages: int) -> Frame:
        return Frame(self.backing, self.page + pages)


HOST_BACKING = "host"
"""The backing of declared memory: `page` is a host page number."""


IMAGE_BACKING = "image"
"""The backing of a restored guest's pages that come from its image: `page` is a page of it."""
ZERO_BACKING = "zero"
"""The backing of its pages that the VMM gave back: `page` is a page of the VMM."""


class Cache(Enum):
    NORMAL = "normal"
    NOT_CACHED = "not_cached"


class Extent(msgspec.Struct, frozen=True, gc=False):
    """The pages around a fault that one VMA backs, with contiguous frames from `frame` on.

    `access` is the rights of the VMA; `io` is its VM_IO | VM_PFNMAP flag, None if unknown; `vma` is all of
    its pages, of which the question may have wanted only some.
    """

    uaddrs: UaddrRange
    frame: Frame
    access: Access
    io: bool | None
    vma: UaddrRange

    @property
    def start(self) -> int:
        return self.uaddrs.start

    @property
    def end(self) -> int:
        return self.uaddrs.end

    def slice(self, start: int, end: int) -> Extent:
        uaddrs = self.uaddrs
        if start == uaddrs.start and end == uaddrs.end:
            return self
        frame = self.frame.ahead(start - uaddrs.start)
        return Extent(UaddrRange(start=start, end=end), frame, self.access, self.io, self.vma)


class Mapping(msgspec.Struct, frozen=True, gc=False):
    """Guest pages [start, end) mapped to contiguous frames from `frame` on.

    A mapping without rights is the SLAT's NO_ACCESS: the gfns have entries, but the guest cannot access them.
    """

    start: int
    end: int
    frame: Frame | None
    start_uaddr_page: int
    access: Access
    cache: Cache = Cache.NORMAL

    @property
    def gfns(self) -> GfnRange:
        return GfnRange(start=self.start, end=self.end)

    def frame_at(self, gfn: int) -> Frame | None:
        return None if self.frame is None else self.frame.ahead(gfn - self.start)

    def slice(self, start: int, end: int) -> Mapping:
        if start == self.start and end == self.end:
            return self
        ahead = start - self.start
        frame = self.frame
        if frame is not None and ahead:
            frame = Frame(frame.backing, frame.page + ahead)
        return Mapping(start, end, frame, self.start_uaddr_page + ahead, self.access, self.cache)

    def continued_by(self, following: Mapping) -> bool:
        """Whether `following` begins where this one ends, with the next frame and the same rights."""
        return (
            self.end == following.start
            and self.access is following.access
            and self.cache is following.cache
            and self.start_uaddr_page + self.end - self.start == following.start_uaddr_page
            and _continues(following.frame, self.frame, self.end - self.start)
        )

    def serves(self, other: Mapping) -> bool:
        """Whether this mapping already gives the frames and rights that `other`, a part of it, wants."""
        return self.frame_at(other.start) == other.frame and other.access in self.access


def _continues(frame: Frame | None, first: Frame | None, pages: int) -> bool:
    """Whether `frame` is that of the page so many pages behind `first`."""
    if frame is None or first is None:
        return frame is first
    return frame.page == first.page + pages and frame.backing == first.backing


def insert_joined(mappings: RangeMap[Mapping], mapping: Mapping) -> bool:
    """Insert a mapping, merged with the neighbours that it continues: memory that comes and goes page by page
    must not leave an entry per page. False if it overlaps another: then it is not inserted."""
    before, after = mappings.last_before_and_next(mapping.end)
    if before is not None and before.end > mapping.start:
        return False
    if after is not None and mapping.continued_by(after):
        mappings.carve(after)
        mapping = replace(mapping, end=after.end)
    if before is not None and before.continued_by(mapping):
        mappings.extend(before, replace(before, end=mapping.end))
    else:
        mappings.insert_unchecked(mapping)
    return True


def join(mappings: RangeMap[Mapping], mapping: Mapping) -> None:
    """Merge a mapping of `mappings` with the neighbours that it continues, if any."""
    mappings.carve(mapping)
    insert_joined(mappings, mapping)
