"""What lies at which pages, for ranges of any length.

Owns cutting what is there when something else comes. Must not know what the items are.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from typing import Generic, Protocol, Self, TypeVar


class PageItem(Protocol):
    """Says something about the pages [start, end)."""

    @property
    def start(self) -> int: ...

    @property
    def end(self) -> int: ...

    def slice(self, start: int, end: int) -> Self:
        """The same about some of its pages."""


Item = TypeVar("Item", bound=PageItem)
Span = tuple[int, int]
"""Pages [start, end)."""


class PageMap(Generic[Item]):
    """Items that do not overlap, by ascending page."""

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._items: list[Item] = []

    def __iter__(self) -> Iterator[Item]:
        """Do not edit under it."""
        return iter(self._items)

    def at(self, page: int) -> Item | None:
        place = bisect_right(self._starts, page) - 1
        return self._items[place] if place >= 0 and page < self._items[place].end else None

    def overlapping(self, start: int, end: int) -> list[Item]:
        """Whole items."""
        first = bisect_right(self._starts, start) - 1
        if first < 0 or self._items[first].end <= start:
            first += 1
        last = bisect_right(self._starts, end - 1)
        return self._items[first:last]

    def clipped(self, start: int, end: int) -> list[Item]:
        """What of the items lies in [start, end)."""
        return [
            item.slice(max(start, item.start), min(end, item.end)) for item in self.overlapping(start, end)
        ]

    def gaps(self, start: int, end: int) -> list[Span]:
        """Where in [start, end) nothing is."""
        return without((start, end), ((item.start, item.end) for item in self.overlapping(start, end)))

    def carve(self, start: int, end: int) -> None:
        """Remove everything in [start, end)."""
        overlapping = self.overlapping(start, end)
        if not overlapping:
            return
        rest = []
        if overlapping[0].start < start:
            rest.append(overlapping[0].slice(overlapping[0].start, start))
        if end < overlapping[-1].end:
            rest.append(overlapping[-1].slice(end, overlapping[-1].end))
        first = bisect_right(self._starts, overlapping[0].start) - 1
        place = slice(first, first + len(overlapping))
        self._items[place] = rest
        self._starts[place] = [item.start for item in rest]

    def put(self, item: Item) -> None:
        """In place of what is there."""
        self.carve(item.start, item.end)
        place = bisect_right(self._starts, item.start)
        self._items.insert(place, item)
        self._starts.insert(place, item.start)


def without(whole: Span, parts: Iterator[Span] | list[Span]) -> list[Span]:
    """What of `whole` lies in none of `parts`, which are in order and do not overlap."""
    start, end = whole
    rest = []
    for part_start, part_end in parts:
        if start < min(part_start, end):
            rest.append((start, min(part_start, end)))
        start = max(start, part_end)
    if start < end:
        rest.append((start, end))
    return rest


def joined(spans: Iterator[Span]) -> list[Span]:
    """Ascending spans, with those that touch as one."""
    whole: list[Span] = []
    for start, end in spans:
        if whole and whole[-1][1] == start:
            whole[-1] = whole[-1][0], end
        else:
            whole.append((start, end))
    return whole
