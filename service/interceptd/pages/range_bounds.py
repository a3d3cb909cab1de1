"""Where page ranges, which may overlap, begin and end: tells whether one is near without looking at each.

Owns the starts and the ends, sorted separately; must not know which of them belong together. The ranges that
overlap [a, b) are those that start before b without those that end at or before a, so they need only be
counted: O(log n). An edit moves up to n numbers.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from typing import TypeVar

from intercept_protocol.addresses import PageRange

Range = TypeVar("Range", bound=PageRange)


class RangeBounds:
    """A multiset of page ranges."""

    __slots__ = ("_ends", "_starts")

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._ends: list[int] = []

    def add(self, pages: PageRange) -> None:
        insort(self._starts, pages.start)
        insort(self._ends, pages.end)

    def remove(self, pages: PageRange) -> None:
        """Remove a range that was added."""
        del self._starts[bisect_left(self._starts, pages.start)]
        del self._ends[bisect_left(self._ends, pages.end)]

    def touches(self, pages: PageRange) -> bool:
        """Whether any range overlaps `pages`."""
        return bisect_left(self._starts, pages.end) > bisect_right(self._ends, pages.start)

    def gap(self, page: int, within: Range) -> Range:
        """The largest part of `within` around `page` that no range overlaps; none may hold `page`."""
        before = bisect_right(self._ends, page)
        behind = bisect_right(self._starts, page)
        start = max(within.start, self._ends[before - 1]) if before else within.start
        end = min(within.end, self._starts[behind]) if behind < len(self._starts) else within.end
        return within.slice(start, end)
