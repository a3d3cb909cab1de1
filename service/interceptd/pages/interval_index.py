"""Finds which of many page ranges, which may overlap, overlap a given one.

Owns the search; must not know what it indexes. A range is filed by its size class, a power of two named
`step`, and by its centre, the first multiple of `step` in it. A class holds the ranges that are longer than
`step` and at most twice as long (and single pages, where `step` is 1). So each range has a centre, and the
ranges that overlap [a, b) have theirs in (a - 2 * step, b + step - 1). An ordered scan of these finds at most
three outside [a, b). All ranges of one centre contain it, so those of them that overlap [a, b) are all, or
the last by their ends, or the first by their starts. A search thus costs O(classes * log n) plus its results,
whatever ranges are stored. There are at most 52 classes.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import takewhile
from typing import Generic, TypeVar

import msgspec

from intercept_protocol.addresses import PageRange
from interceptd.pages.ordered_map import OrderedMap
from interceptd.pages.sorted_chunks import SortedChunks

Value = TypeVar("Value")


class IntervalIndex(Generic[Value]):
    """Values indexed by page ranges. An alias, a number given by the caller, distinguishes equal ranges."""

    __slots__ = ("_classes", "_size")

    def __init__(self) -> None:
        self._classes: dict[int, OrderedMap[_Entry[Value] | _SameCentre[Value]]] = {}
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
            held = members[centre] = _SameCentre(SortedChunks.of(held), SortedChunks.of(held))
            held.add(entry)
        else:
            held.add(entry)
        self._size += 1

    def remove(self, pages: PageRange, alias: int) -> None:
        """Remove the value inserted under the pair."""
        step, centre = _place(pages)
        members = self._classes[step]
        held = members.pop(centre)
        if isinstance(held, _SameCentre):
            held.remove(pages, alias)
            members[centre] = held.by_start.only or held
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
                if isinstance(held, _SameCentre):
                    yield from held.overlapping(start, end)
                elif start < held.end and held.start < end:
                    yield held.value


class _Entry(msgspec.Struct, Generic[Value], frozen=True, gc=False):
    """One range, under its alias."""

    start: int
    end: int
    alias: int
    value: Value


Key = tuple[int, int, int]


def _by_start(entry: _Entry[Value]) -> Key:
    return entry.start, entry.end, entry.alias


def _by_end(entry: _Entry[Value]) -> Key:
    return entry.end, entry.start, entry.alias


class _SameCentre(msgspec.Struct, Generic[Value], eq=False, gc=False):
    """The ranges of one class and centre where there are several. Most centres have only one."""

    by_start: SortedChunks[_Entry[Value], Key]
    by_end: SortedChunks[_Entry[Value], Key]

    def add(self, entry: _Entry[Value]) -> None:
        self.by_start.add(entry, _by_start)
        self.by_end.add(entry, _by_end)

    def remove(self, pages: PageRange, alias: int) -> None:
        start, end = pages.start, pages.end
        self.by_start.remove((start, end, alias), _by_start)
        self.by_end.remove((end, start, alias), _by_end)

    def overlapping(self, start: int, end: int) -> Iterator[Value]:
        """Meets at most one range that does not overlap."""
        if self.by_start.last.start < end:
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
