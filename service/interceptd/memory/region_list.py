"""The regions of a partition, by gfn and by uaddr.

Owns that they are disjoint in gfns, limited in number, and found from either side: two regions may alias one
uaddr range. Must not know locks, mappings or faults.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from itertools import pairwise

from intercept_protocol.addresses import PAGE_LIMIT, GfnRange, UaddrRange
from intercept_protocol.elements import about_element
from intercept_protocol.errors import WireError
from interceptd.memory.region import Region
from interceptd.pages.interval_index import IntervalIndex
from interceptd.pages.ordered_map import OrderedMap


class RegionList:
    """Sorted and disjoint (I3)."""

    __slots__ = ("_by_gfn", "_by_uaddr", "_limit")

    def __init__(self, limit: Callable[[], int]) -> None:
        self._limit = limit
        self._by_gfn: OrderedMap[Region] = OrderedMap()
        self._by_uaddr: IntervalIndex[Region] = IntervalIndex()

    def __len__(self) -> int:
        return len(self._by_gfn)

    def __iter__(self) -> Iterator[Region]:
        return iter(self._by_gfn)

    def find(self, gfn: int) -> Region | None:
        """The region that covers `gfn`."""
        region = self._by_gfn.floor(gfn)
        return region if region is not None and gfn < region.gfns.end else None

    def starting_from(self, gfn: int) -> Iterator[Region]:
        """The regions that start at `gfn` or behind it, in order; do not edit under it."""
        return self._by_gfn.between(gfn, PAGE_LIMIT)

    def between(self, start_gfn: int, end_gfn: int) -> Iterator[Region]:
        """The regions that start in [start_gfn, end_gfn), in order; do not edit under it."""
        return self._by_gfn.between(start_gfn, end_gfn)

    def behind(self, uaddrs: UaddrRange) -> Iterator[Region]:
        """Every region that is backed by some of these pages, aliases included; do not edit under it."""
        return self._by_uaddr.overlapping(uaddrs)

    def add(self, region: Region) -> None:
        """Raises EEXIST on overlap of the half-open gfn ranges, ENOSPC at the limit."""
        overlapped = self._overlapping(region.gfns)
        if overlapped is not None:
            raise _overlap(region, overlapped)
        limit = self._limit()
        if len(self._by_gfn) >= limit:
            raise _too_many(limit)
        self.link(region)

    def link(self, region: Region) -> None:
        """Add a region for which there is room."""
        self._by_gfn[region.gfns.start] = region
        self._by_uaddr.add(region.uaddrs, region.gfns.start, region)

    def require_room(self, new: Sequence[Region], old: Set[Region]) -> None:
        """Raise what adding `new` in order would raise if `old` were gone; EEXIST names the element."""
        if not _disjoint(new) or any(self._reaching_besides(old, region.gfns) for region in new):
            self._refuse(new, old)
        limit = self._limit()
        if len(new) > len(old) and len(self._by_gfn) - len(old) + len(new) > limit:
            raise _too_many(limit)

    def _refuse(self, new: Sequence[Region], old: Set[Region]) -> None:
        """Raise EEXIST about the first of `new` that overlaps one before it, or one that stays."""
        [(index, overlapped), *_] = self._overlaps(new, old)
        with about_element("add", index):
            raise _overlap(new[index], overlapped)

    def _overlaps(self, new: Sequence[Region], old: Set[Region]) -> Iterator[tuple[int, Region]]:
        """Which of `new` overlap something, and what."""
        coming: OrderedMap[Region] = OrderedMap()
        for index, region in enumerate(new):
            overlapped = _reaching(coming, region.gfns) or self._reaching_besides(old, region.gfns)
            if overlapped is not None:
                yield index, overlapped
            coming[region.gfns.start] = region

    def remove(self, region: Region) -> None:
        del self._by_gfn[region.gfns.start]
        self._by_uaddr.remove(region.uaddrs, region.gfns.start)

    def exactly(self, gfns: GfnRange, uaddrs: UaddrRange) -> Region:
        """The region with just these ranges; ENOENT when none starts there, EINVAL on a mismatch."""
        region = self._by_gfn.get(gfns.start)
        if region is None:
            raise WireError(errno.ENOENT, f"no region starts at gfn {gfns.start:#x}", start_gfn=gfns.start)
        for field, asked, held in (
            ("page_count", gfns.page_count, region.gfns.page_count),
            ("start_uaddr", uaddrs.start_uaddr, region.uaddrs.start_uaddr),
        ):
            if asked != held:
                raise WireError(
                    errno.EINVAL,
                    f"the region at gfn {gfns.start:#x} has {field} {held:#x}, not {asked:#x}",
                    field=field,
                )
        return region

    def _overlapping(self, gfns: GfnRange) -> Region | None:
        return _reaching(self._by_gfn, gfns)

    def _reaching_besides(self, old: Set[Region], gfns: GfnRange) -> Region | None:
        """A region that overlaps `gfns` and is not in `old`; looks at no more of `old` than overlap them."""
        if self._overlapping(gfns) is None:
            return None
        for region in self._by_gfn.between(gfns.start, gfns.end):
            if region not in old:
                return region
        first = self._by_gfn.floor(gfns.start)
        return first if first is not None and first.gfns.overlaps(gfns) and first not in old else None


def _reaching(regions: OrderedMap[Region], gfns: GfnRange) -> Region | None:
    """The last region that starts below the end of `gfns`, if it reaches into them."""
    region = regions.floor(gfns.end - 1)
    return region if region is not None and region.gfns.overlaps(gfns) else None


def _disjoint(regions: Iterable[Region]) -> bool:
    ordered = sorted(region.gfns for region in regions)
    return all(before.end <= after.start for before, after in pairwise(ordered))


def _overlap(region: Region, overlapped: Region) -> WireError:
    return WireError(
        errno.EEXIST,
        f"region {region.gfns} overlaps {overlapped.gfns}",
        start_gfn=overlapped.gfns.start,
        page_count=overlapped.gfns.page_count,
    )


def _too_many(limit: int) -> WireError:
    return WireError(errno.ENOSPC, f"a partition may have {limit} regions", limit="regions_per_partition")
