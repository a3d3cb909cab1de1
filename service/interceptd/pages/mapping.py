"""What stands behind a guest page, and how the guest may reach it.

Owns the frame and the mapping: plain values that can be cut. Must not know who made them.
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

    The backing is the frame's identity, not its present location: see the design of the address spaces.
    """

    backing: str
    page: int

    def ahead(self, pages: int) -> Frame:
        return Frame(self.backing, self.page + pages)


HOST_BACKING = "host"
"""The backing of declared memory: `page` is a host page number."""


class Cache(Enum):
    NORMAL = "normal"
    NOT_CACHED = "not_cached"


class Extent(msgspec.Struct, frozen=True, gc=False):
    """The pages around a fault that one VMA really backs: `frame` is that of the first, the rest follow it.

    `access` are the VMA's own rights, `io` its VM_IO | VM_PFNMAP flag, None where it was not looked at.
    """

    uaddrs: UaddrRange
    frame: Frame
    access: Access
    io: bool | None


class Mapping(msgspec.Struct, frozen=True, gc=False):
    """Guest pages [start, end) and the frames they reach, in step; `frame` is that of the first.

    A mapping without rights is the SLAT's NO_ACCESS: the gfns are known, the guest reaches nothing.
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
        return replace(
            self,
            start=start,
            end=end,
            frame=self.frame_at(start),
            start_uaddr_page=self.start_uaddr_page + start - self.start,
        )

    def continued_by(self, following: Mapping) -> bool:
        """Whether `following` begins where this one ends, with the next frame and the same rights."""
        return (
            self.end == following.start
            and self.access is following.access
            and self.cache is following.cache
            and self.start_uaddr_page + self.end - self.start == following.start_uaddr_page
            and self.frame_at(self.end) == following.frame
        )

    def serves(self, other: Mapping) -> bool:
        """Whether what `other` wants within this mapping is what it already gives."""
        return self.frame_at(other.start) == other.frame and other.access in self.access


def insert_joined(mappings: RangeMap[Mapping], mapping: Mapping) -> None:
    """Put in a mapping, as one with the neighbours that it continues: memory that comes and goes page by page
    must not cost an entry a page for ever."""
    mappings.insert(mapping)
    join(mappings, mapping)


def join(mappings: RangeMap[Mapping], mapping: Mapping) -> None:
    """Make one of a mapping that is in there and the neighbours that it continues, or leave it as it is."""
    before, after = mappings.find(mapping.start - 1), mappings.find(mapping.end)
    joined = mapping
    if before is not None and before.continued_by(mapping):
        joined = replace(before, end=mapping.end)
    if after is not None and mapping.continued_by(after):
        joined = replace(joined, end=after.end)
    if joined is not mapping:
        mappings.carve(joined)
        mappings.insert(joined)
