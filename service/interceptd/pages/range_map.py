"""An ordered map of disjoint page ranges.

Owns ordering, disjointness and cutting; must not know what its items mean. Mappings, SLAT entries, VMAs and
pending invalidations are all kept in one of these. Every operation costs O(log n) plus what it touches.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Generic, Protocol, Self, TypeVar

from intercept_protocol.addresses import PageRange
from interceptd.pages.ordered_map import OrderedMap


class RangeItem(Protocol):
    """Something that occupies the pages [start, end) and can be cut."""

    @property
    def start(self) -> int: ...

    @property
    def end(self) -> int: ...

    def slice(self, start: int, end: int, /) -> Self:
        """The part that occupies [start, end), which lies within this item."""


Item = TypeVar("Item", bound=RangeItem)


class RangeMap(Generic[Item]):
    """Disjoint items in the order of their pages."""

    __slots__ = ("_items", "_page_count")

    def __init__(self) -> None:
        self._items: OrderedMap[Item] = OrderedMap()
        self._page_count = 0

    def __len__(self) -> int:
        return len(self._items)

    def __iter__(self) -> Iterator[Item]:
        return iter(self._items)

    @property
    def page_count(self) -> int:
        """Pages that are occupied."""
        return self._page_count

    def find(self, page: int) -> Item | None:
        """The item that occupies `page`."""
        item = self._items.floor(page)
        return item if item is not None and page < item.end else None

    def touches(self, pages: RangeItem | PageRange) -> bool:
        """Whether an item occupies some of `pages`."""
        last = self._items.floor(pages.end - 1)
        return last is not None and last.end > pages.start

    def overlapping(self, pages: RangeItem | PageRange) -> list[Item]:
        """The items that touch `pages`, whole and in order: a snapshot, safe to edit under."""
        last = self._items.floor(pages.end - 1)
        if last is None or last.end <= pages.start:
            return []
        if last.start <= pages.start:  # mostly there is one, or none: told in a third of the time
            return [last]
        first = self.find(pages.start)
        found = list(self._items.between(pages.start, pages.end))
        return found if first is None or first.start == pages.start else [first, *found]

    def clipped(self, pages: RangeItem | PageRange) -> list[Item]:
        """Like `overlapping`, with the first and last item cut to `pages`."""
        return [
            item
            if pages.start <= item.start and item.end <= pages.end
            else item.slice(max(item.start, pages.start), min(item.end, pages.end))
            for item in self.overlapping(pages)
        ]

    def gaps(self, pages: RangeItem | PageRange) -> list[tuple[int, int]]:
        """The parts of `pages` that no item occupies, as (start, end) in order."""
        gaps = []
        position = pages.start
        for item in self.overlapping(pages):
            if position < item.start:
                gaps.append((position, item.start))
            position = item.end
        if position < pages.end:
            gaps.append((position, pages.end))
        return gaps

    def head(self, pages: PageRange, items: int) -> PageRange:
        """The longest start of `pages` that few items begin in: for walks that must let others run."""
        following = next(islice(self._items.between(pages.start, pages.end), items, None), None)
        return pages.slice(pages.start, pages.end if following is None else following.start)

    def insert(self, item: Item) -> None:
        """Put an item where nothing is; the caller has looked."""
        assert not self.touches(item), f"{item} overlaps {self.overlapping(item)[0]}"
        self._items[item.start] = item
        self._page_count += item.end - item.start

    def carve(self, pages: RangeItem | PageRange) -> list[Item]:
        """Take out whatever lies in `pages`, cutting at both ends, and return what was taken."""
        taken = []
        for item in self.overlapping(pages):
            del self._items[item.start]
            start, end = max(item.start, pages.start), min(item.end, pages.end)
            if item.start < start:
                self._items[item.start] = item.slice(item.start, start)
            if end < item.end:
                self._items[end] = item.slice(end, item.end)
            taken.append(item if (item.start, item.end) == (start, end) else item.slice(start, end))
            self._page_count -= end - start
        return taken
