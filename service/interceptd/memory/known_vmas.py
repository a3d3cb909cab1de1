"""What was learned of a VMM's VMAs: what backs which uaddrs, until an invalidation overlaps them.

Owns the extents that were looked up, by uaddr. It answers only where memory is: whatever else it finds, the
address space must be asked, also before an access is refused. Pure; must not know how an extent is looked up,
nor what makes it stale. No successor of the daemon gets any of it.
"""

from __future__ import annotations

from typing import Final

from intercept_protocol.addresses import UaddrRange
from interceptd.memory_budget import CacheShare, uncounted
from interceptd.pages.mapping import Extent
from interceptd.pages.range_map import RangeMap

KNOWN_EXTENTS: Final = 512
"""The most extents that are remembered of a partition, some 200 KiB, if its uid's memory has room for them.
Others are asked for each time."""


class KnownVmas:
    """See the module. One per partition, which `share` bounds."""

    __slots__ = ("_extents", "_share")
    learns = True

    def __init__(self, share: CacheShare | None = None) -> None:
        self._extents: RangeMap[Extent] = RangeMap()
        self._share = share or uncounted()

    def __len__(self) -> int:
        return len(self._extents)

    def find(self, page: int, window: UaddrRange) -> Extent | None:
        """All that the VMA at `page` backs of `window`; None if that is not known."""
        known = self._extents.find(page)
        if known is None:
            return None
        start, end = max(window.start, known.vma.start), min(window.end, known.vma.end)
        return known.slice(start, end) if known.start <= start and end <= known.end else None

    def learn(self, extent: Extent) -> None:
        """Remember an extent instead of what was known of its pages, if there is room."""
        self._cut_out(extent.uaddrs)
        count = len(self._extents) + 1
        if count <= KNOWN_EXTENTS and self._share.resize(count):
            self._extents.insert(extent)

    def forget(self, uaddrs: UaddrRange) -> None:
        """Know nothing of `uaddrs` any more."""
        if self._extents.touches(uaddrs):
            self._cut_out(uaddrs)

    def _cut_out(self, uaddrs: UaddrRange) -> None:
        self._extents.carve(uaddrs)
        count = len(self._extents)
        if count > KNOWN_EXTENTS or not self._share.resize(count):  # one was cut in two
            self._extents = RangeMap()
            self._share.resize(0)
