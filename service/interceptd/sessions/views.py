"""What VMMs and operators see of a partition: pages of its regions, VMAs and mappings.

Owns the shape of those pages and where each starts. A page starts after a key, not at an index, so it is
right whatever changed since the last one, and costs the same however long the list is. Must not know who
asks.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Sequence
from typing import TypeVar

from intercept_protocol.addresses import PAGE_SHIFT
from intercept_protocol.errors import WireError
from intercept_protocol.messages import MappingPage, MappingView, RegionPage, RegionView, VmaPage, VmaView
from intercept_protocol.outcomes import Access, allows
from interceptd.address_space.declared import DeclaredAddressSpace, Vma
from interceptd.memory.region import Region
from interceptd.pages.mapping import Mapping
from interceptd.partition.partition import Partition
from interceptd.scheduling.time_share import give_way

Item = TypeVar("Item")
View = TypeVar("View")


def declared(partition: Partition) -> DeclaredAddressSpace:
    """The VMAs of a VMM that declares them; EINVAL for another."""
    memory = partition.memory
    if not isinstance(memory, DeclaredAddressSpace):
        raise WireError(errno.EINVAL, "VMAs are declared only with address_space declared")
    return memory


async def region_page(partition: Partition, after: int | None) -> RegionPage:
    regions = partition.regions.first_regions(RegionPage.PAGE + 1, _behind(after))
    return RegionPage(
        regions=await _views(regions, region_view, RegionPage.PAGE), more=len(regions) > RegionPage.PAGE
    )


async def vma_page(partition: Partition, after: int | None) -> VmaPage:
    """Raises EINVAL where VMAs are not declared."""
    first = 0 if after is None else (after >> PAGE_SHIFT) + 1
    vmas = declared(partition).first_vmas(VmaPage.PAGE + 1, first)
    return VmaPage(vmas=await _views(vmas, _vma_view, VmaPage.PAGE), more=len(vmas) > VmaPage.PAGE)


async def mapping_page(partition: Partition, after: int | None) -> MappingPage:
    mappings = partition.regions.first_mappings(MappingPage.PAGE + 1, _behind(after))
    return MappingPage(
        mappings=await _views(mappings, _mapping_view, MappingPage.PAGE),
        more=len(mappings) > MappingPage.PAGE,
    )


def region_view(region: Region) -> RegionView:
    return RegionView(
        start_gfn=region.gfns.start,
        page_count=region.gfns.page_count,
        start_uaddr=region.uaddrs.start_uaddr,
        kind=region.kind,
        state=region.state.value,
        writable=allows(region.access, Access.WRITE),
        executable=allows(region.access, Access.EXECUTE),
        mapped_gfns=region.mapped_gfns,
    )


def _vma_view(vma: Vma) -> VmaView:
    return VmaView(
        start_uaddr=vma.start << PAGE_SHIFT,
        page_count=vma.end - vma.start,
        start_pfn=vma.start_pfn,
        readable=allows(vma.access, Access.READ),
        writable=allows(vma.access, Access.WRITE),
        executable=allows(vma.access, Access.EXECUTE),
        io=vma.io,
    )


def _mapping_view(mapping: Mapping) -> MappingView:
    frame = mapping.frame
    assert frame is not None, "NO_ACCESS is not recorded as mapped"
    return MappingView(
        start_gfn=mapping.start,
        page_count=mapping.end - mapping.start,
        start_uaddr=mapping.start_uaddr_page << PAGE_SHIFT,
        frame=(frame.backing, frame.page),
        access=int(mapping.access),
    )


def _behind(after: int | None) -> int:
    return 0 if after is None else after + 1


async def _views(items: Sequence[Item], view: Callable[[Item], View], count: int) -> list[View]:
    """Of the first `count` items."""
    views = []
    for item in items[:count]:
        views.append(view(item))
        await give_way()
    return views
