"""A region: contiguous gfns backed by one uaddr range.

Owns the translation between the two and the window that one fault may map; must not know which regions there
are, nor what is mapped.
"""

from __future__ import annotations

from enum import Enum

import msgspec

from intercept_protocol.addresses import GfnRange, UaddrRange
from intercept_protocol.messages import MmioGranularity, RegionKind
from intercept_protocol.outcomes import Access, allows
from interceptd.pages.mapping import Cache, Extent, Mapping

FAULT_IN_PAGES = 512
"""MSHV_MAP_FAULT_IN_PAGES: a fault on movable memory maps the 2 MiB around it, counted from the region's
start and not from gfn 0 (mshv_region_handle_gfn_fault), unless the region has blocks of its own."""


_ACCESSES = tuple(Access(bits) for bits in range(8))
"""By their bits. To combine flags took 2.3 us, twice a first touch; to combine numbers takes 0.4."""
_READ, _EXECUTE = Access.READ.value, Access.EXECUTE.value
_READ_WRITE = _READ | Access.WRITE.value


LARGE_PAGE = 512
"""Pages of a large page, 2 MiB, which a second-level table maps by one entry where gfn and frame allow it."""


class RegionState(Enum):
    POPULATING = "populating"
    """A pinned region that is not whole yet: its faults are told RETRY."""
    LIVE = "live"
    DANGLING = "dangling"
    """A pinned region whose memory went: the VMM broke its promise, nothing is mapped from it again."""


class KindOrigin(Enum):
    """Where the region's kind came from."""

    STATED = "stated"
    """The VMM's word, whatever the VMA says: vfio-user BARs and test BARs are plain files."""
    INFERRED = "inferred"
    """Read off the VMA (`kind: auto`), and checked again at each fault."""


class Region(msgspec.Struct, eq=False, gc=False):
    """`gfns` and `uaddrs` have the same length; page k of one stands behind page k of the other."""

    gfns: GfnRange
    uaddrs: UaddrRange
    kind: RegionKind
    kind_origin: KindOrigin
    access: Access
    state: RegionState = RegionState.LIVE
    mapped_gfns: int = 0
    """Gfns that are recorded as mapped: counted, because a region may have a mapping for each."""
    block: int = FAULT_IN_PAGES
    """Pages that a fault on movable memory may map, counted in blocks from the region's start."""

    def uaddrs_of(self, gfns: GfnRange) -> UaddrRange:
        shift = self.uaddrs.start - self.gfns.start
        return UaddrRange(start=gfns.start + shift, end=gfns.end + shift)

    def gfns_of(self, uaddrs: UaddrRange) -> GfnRange:
        shift = self.gfns.start - self.uaddrs.start
        return GfnRange(start=uaddrs.start + shift, end=uaddrs.end + shift)

    def window(self, gfn: int, granularity: MmioGranularity) -> GfnRange:
        """The most that a fault on `gfn` may map."""
        match self.kind:
            case RegionKind.MMIO if granularity is MmioGranularity.PAGE:
                return GfnRange(start=gfn, end=gfn + 1)
            case RegionKind.MOVABLE:
                start = gfn - (gfn - self.gfns.start) % self.block
                return GfnRange(start=start, end=min(start + self.block, self.gfns.end))
            case _:
                return self.gfns

    def fits(self, extent: Extent) -> bool:
        """Whether the VMA is still of the kind that `auto` saw."""
        return self.kind_origin is KindOrigin.STATED or (
            extent.io is not None and kind_of_vma(extent.io) is self.kind
        )

    def grants(self, extent: Extent, access: Access) -> bool:
        """Whether the guest may have this access to the extent."""
        return self.fits(extent) and allows(self.rights(extent), access)

    def splits_large_page(self, extent: Extent) -> bool:
        """Whether the extent has only a part of a large page that region and VMA have whole.

        A large page is one of gfns and of uaddrs at once. Only the first and the last can be cut.
        """
        if (self.gfns.start - self.uaddrs.start) % LARGE_PAGE:
            return False
        first = extent.uaddrs.start // LARGE_PAGE * LARGE_PAGE
        last = (extent.uaddrs.end - 1) // LARGE_PAGE * LARGE_PAGE
        start, end = max(self.uaddrs.start, extent.vma.start), min(self.uaddrs.end, extent.vma.end)
        return (start <= first < extent.uaddrs.start and first + LARGE_PAGE <= end) or (
            start <= last and extent.uaddrs.end < last + LARGE_PAGE <= end
        )

    def rights(self, extent: Extent) -> Access:
        """Read and write are those of region and VMA together. Execute is the region's alone, because hosts
        map guest RAM without PROT_EXEC, but what may not be read is not fetched from either."""
        region, vma = int(self.access), int(extent.access)
        rights = region & vma & _READ_WRITE
        return _ACCESSES[rights | region & _EXECUTE if rights & _READ else rights]

    def mapping(self, extent: Extent) -> Mapping:
        """The guest's view of an extent that lies within the region."""
        start, end = extent.uaddrs.start, extent.uaddrs.end
        shift = self.gfns.start - self.uaddrs.start
        cache = Cache.NOT_CACHED if self.kind is RegionKind.MMIO else Cache.NORMAL
        return Mapping(start + shift, end + shift, extent.frame, start, self.rights(extent), cache)

    def explains(self, mapping: Mapping) -> bool:
        """Whether a mapping within the region can be one of it: of its memory, kind and rights."""
        if not mapping.access:
            return self.kind is RegionKind.MOVABLE and mapping.frame is None
        return (
            mapping.start_uaddr_page - mapping.start == self.uaddrs.start - self.gfns.start
            and mapping.access in self.access
            and (mapping.cache is Cache.NOT_CACHED) is (self.kind is RegionKind.MMIO)
        )

    def no_access(self, gfns: GfnRange) -> Mapping:
        """NO_ACCESS over part of the region: how movable memory waits for its first touch."""
        start_uaddr_page = gfns.start + self.uaddrs.start - self.gfns.start
        return Mapping(gfns.start, gfns.end, None, start_uaddr_page, Access.NONE)


Piece = tuple[Region, GfnRange]
"""Gfns of one region."""


def kind_of_vma(io: bool) -> RegionKind:
    """How mshv tells MMIO from memory: VM_IO | VM_PFNMAP on the VMA (mshv_map_user_memory)."""
    return RegionKind.MMIO if io else RegionKind.MOVABLE
