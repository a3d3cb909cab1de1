"""Finds which of many page ranges, which may overlap, overlap a given one.

Owns the search; must not know what it indexes. A range is filed by its size class, a power of two named
`step`, and by its centre, the first multiple of `step` in it. A class holds the ranges that are longer than
`step` and at most twice as long (and single pages, where `step` is 1). So each range has a centre, and the
ranges that overlap [a, b) have theirs in (a - 2 * step, b + step - 1). An ordered scan of these finds at most
three outside [a, b). The ranges of one centre all hold it: those of them that overlap [a, b) are all, or the
last by their ends, or the first by their starts. A search thus costs O(classes * log n) plus its results,
whatever ranges are stored. There are at most 52 classes.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator
from itertools import takewhile
from operator import attrgetter
from typing import Generic, TypeVar

import msgspec

from intercept_protocol.addresses import PageRange
from interceptd.pages.ordered_map import OrderedMap

Value = TypeVar("Value")


class IntervalIndex(Generic[Value]):
    """Values indexed by page ranges. An alias, a number given by the caller, distinguishes equal ranges."""

    __slots__ = ("_classes", "_size")

    def __init__(self) -> None:
        self._classes: dict[int, OrderedMap[_Entry[Value] | _Crowd[Value]]] = {}
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def add(self, pages: PageRange, alias: int, value: Value) -> None:
        """Insert `value`; the index must not contain the pair of `pages` and `alias` yet."""
        step, centre = _place(pages)
        members = self._classes.get(step)
        if members is None:
            members = self._classes[step] = OrderedMap()
        entry = _Entry(pages.start, pages.end, alias, value)
        held = members.get(centre)
        if held is None:
            members[centre] = entry
        elif isinstance(held, _Entry):
            members[centre] = _Crowd(held, entry)
        else:
            held.add(entry)
        self._size += 1

    def remove(self, pages: PageRange, alias: int) -> None:
        """Remove the value inserted under the pair."""
        step, centre = _place(pages)
        members = self._classes[step]
        held = members.pop(centre)
        if isinstance(held, _Crowd):
            held.remove(pages, alias)
            members[centre] = held if len(held.by_start) > 1 else held.by_start[0]
        else:
            assert (held.start, held.end, held.alias) == (pages.start, pages.end, alias), "it was added"
            if not members:
                del self._classes[step]
        self._size -= 1

    def overlapping(self, pages: PageRange) -> Iterator[Value]:
        """The values whose ranges overlap `pages`, in no particular order.

        Each is searched for when the caller asks for it. Do not edit the index while iterating.
        """
        start, end = pages.start, pages.end
        for step, members in self._classes.items():
            for held in members.between(start - 2 * step + 1, end + step - 1):
                if isinstance(held, _Crowd):
                    yield from held.overlapping(start, end)
                elif start < held.end and held.start < end:
                    yield held.value


class _Entry(msgspec.Struct, Generic[Value], frozen=True, gc=False):
    """One range, under its alias."""

    start: int
    end: int
    alias: int
    value: Value


_by_start = attrgetter("start", "end", "alias")
_by_end = attrgetter("end", "start", "alias")


class _Crowd(Generic[Value]):
    """The ranges of one class and centre where there are several. Most centres have one, without a crowd."""

    __slots__ = ("by_end", "by_start")

    def __init__(self, *entries: _Entry[Value]) -> None:
        self.by_start = sorted(entries, key=_by_start)
        self.by_end = sorted(entries, key=_by_end)

    def add(self, entry: _Entry[Value]) -> None:
        insort(self.by_start, entry, key=_by_start)
        insort(self.by_end, entry, key=_by_end)

    def remove(self, pages: PageRange, alias: int) -> None:
        start, end = pages.start, pages.end
        entry = self.by_start.pop(bisect_left(self.by_start, (start, end, alias), key=_by_start))
        assert (entry.start, entry.end, entry.alias) == (start, end, alias), "it was added"
        del self.by_end[bisect_left(self.by_end, (end, start, alias), key=_by_end)]

    def overlapping(self, start: int, end: int) -> Iterator[Value]:
        """Meets at most one range that does not overlap."""
        if self.by_start[-1].start < end:
            for entry in reversed(self.by_end):
                if entry.end <= start:
                    return
                yield entry.value
        else:  # the centre is at or behind `end`, and all ranges hold it
            for entry in takewhile(lambda entry: entry.start < end, self.by_start):
                yield entry.value


def _place(pages: PageRange) -> tuple[int, int]:
    """The step of a range's size class, and the range's centre."""
    start = pages.start
    step = 1 << (pages.end - start - 1 | 1).bit_length() - 1
    return step, start + (-start & step - 1)
