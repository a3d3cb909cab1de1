"""What was learned of a VMM's VMAs: what backs which uaddrs, until an invalidation overlaps them.

Owns the extents that were looked up, by uaddr. It answers only where memory is: whatever else it finds, the
address space must be asked, also before an access is refused. Pure; must not know how an extent is looked up,
nor what makes it stale. No successor of the daemon gets any of it.
"""

from __future__ import annotations

from typing import Final

from intercept_protocol.addresses import UaddrRange
from interceptd.pages.mapping import Extent
from interceptd.pages.range_map import RangeMap

KNOWN_EXTENTS: Final = 512
"""The most extents that are remembered of a partition, some 200 KiB. Others are asked for each time."""


class KnownVmas:
    """See the module. One per partition."""

    __slots__ = ("_extents",)

    def __init__(self) -> None:
        self._extents: RangeMap[Extent] = RangeMap()

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
        self._extents.carve(extent)
        if len(self._extents) < KNOWN_EXTENTS:
            self._extents.insert(extent)

    def forget(self, uaddrs: UaddrRange) -> None:
        """Know nothing of `uaddrs` any more."""
        self._extents.carve(uaddrs)
        if len(self._extents) > KNOWN_EXTENTS:  # one was cut in two
            self._extents = RangeMap()
