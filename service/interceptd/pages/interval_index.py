"""Finds which of many page ranges, which may overlap, overlap a given one.

Owns the search; must not know what it indexes. Ranges are kept by size class, the power of two that bounds
their length: within a class, every range that overlaps [a, b) starts in (a - 2^class, b), so a look-up is one
ordered scan per class in use: O(classes * log n) plus the results. A number given by the caller distinguishes
aliases (equal ranges).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Generic, TypeVar

from sortedcontainers import SortedDict

from intercept_protocol.addresses import PageRange

Value = TypeVar("Value")


class IntervalIndex(Generic[Value]):
    """Values indexed by page ranges."""

    __slots__ = ("_classes", "_size")

    def __init__(self) -> None:
        self._classes: dict[int, SortedDict[tuple[int, int], tuple[int, Value]]] = {}
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def add(self, pages: PageRange, alias: int, value: Value) -> None:
        """Insert `value`; the index must not contain the pair of `pages` and `alias` yet."""
        size_class = _size_class(pages)
        if size_class not in self._classes:
            self._classes[size_class] = SortedDict()  # setdefault would create one, at a cost, each time
        members = self._classes[size_class]
        members[pages.start, alias] = (pages.end, value)
        self._size += 1

    def remove(self, pages: PageRange, alias: int) -> None:
        """Remove the value inserted under the pair."""
        size_class = _size_class(pages)
        members = self._classes[size_class]
        del members[pages.start, alias]
        if not members:
            del self._classes[size_class]
        self._size -= 1

    def overlapping(self, pages: PageRange) -> Iterator[Value]:
        """The values whose ranges overlap `pages`. Do not edit the index while iterating."""
        for size_class, members in self._classes.items():
            lowest = pages.start - (1 << size_class) + 1
            for key in members.irange((lowest, 0), (pages.end, 0), inclusive=(True, False)):
                end, value = members[key]
                if pages.start < end:
                    yield value


def _size_class(pages: PageRange) -> int:
    return (pages.page_count - 1).bit_length()
