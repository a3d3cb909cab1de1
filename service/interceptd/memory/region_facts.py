"""The events of a region that operators see: it was added or removed, or its pinned memory went.

Owns which of a region's values they show. Must not know when they are published, or to whom.
"""

from __future__ import annotations

from intercept_protocol.events import PinnedRegionDangling, RegionAdded, RegionRemoved
from intercept_protocol.outcomes import Access, allows
from interceptd.memory.region import Region


def added(region: Region) -> RegionAdded:
    return RegionAdded(
        start_gfn=region.gfns.start,
        page_count=region.gfns.page_count,
        start_uaddr=region.uaddrs.start_uaddr,
        kind=region.kind,
        writable=allows(region.access, Access.WRITE),
        executable=allows(region.access, Access.EXECUTE),
    )


def removed(region: Region) -> RegionRemoved:
    return RegionRemoved(
        start_gfn=region.gfns.start,
        page_count=region.gfns.page_count,
        start_uaddr=region.uaddrs.start_uaddr,
    )


def dangling(region: Region) -> PinnedRegionDangling:
    return PinnedRegionDangling(
        start_gfn=region.gfns.start,
        page_count=region.gfns.page_count,
        start_uaddr=region.uaddrs.start_uaddr,
    )
