"""An ordered map of disjoint page ranges.

Owns order, disjointness and slicing; must not know what the items mean. Mappings, SLAT entries, VMAs and
pending invalidations are all stored in one. Every operation costs O(log n) plus the items it touches.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Generic, Protocol, Self, TypeVar

from intercept_protocol.addresses import PAGE_LIMIT, PageRange, UaddrRange
from interceptd.pages.ordered_map import OrderedMap


class RangeItem(Protocol):
    """A value that occupies the pages [start, end) and can be sliced."""

    @property
    def start(self) -> int: ...

    @property
    def end(self) -> int: ...

    def slice(self, start: int, end: int, /) -> Self:
        """The part that occupies [start, end), which must lie within this item."""


Item = TypeVar("Item", bound=RangeItem)


class RangeMap(Generic[Item]):
    """Disjoint items, in the order of their pages."""

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
        """The number of occupied pages."""
        return self._page_count

    def find(self, page: int) -> Item | None:
        """The item that occupies `page`."""
        item = self._items.floor(page)
        return item if item is not None and page < item.end else None

    def last_before(self, page: int) -> Item | None:
        """The last item that starts below `page`."""
        return self._items.floor(page - 1)

    def last_before_and_next(self, page: int) -> tuple[Item | None, Item | None]:
        """The last item that starts below `page`, and the next one in order."""
        return self._items.floor_and_next(page - 1)

    def touches(self, pages: RangeItem | PageRange) -> bool:
        """Whether any item overlaps `pages`."""
        last = self._items.floor(pages.end - 1)
        return last is not None and last.end > pages.start

    def first(self, pages: RangeItem | PageRange) -> Item | None:
        """The first item that overlaps `pages`, unsliced."""
        item = self.find(pages.start)
        return item if item is not None else next(self._items.between(pages.start, pages.end), None)

    def overlapping(self, pages: RangeItem | PageRange) -> list[Item]:
        """The items that overlap `pages`, unsliced and in order: a snapshot, so the map may be edited."""
        last = self._items.floor(pages.end - 1)
        if last is None or last.end <= pages.start:
            return []
        if last.start <= pages.start:  # fast path for the usual case of one item
            return [last]
        first = self.find(pages.start)
        found = list(self._items.between(pages.start, pages.end))
        return found if first is None or first.start == pages.start else [first, *found]

    def clipped(self, pages: RangeItem | PageRange) -> list[Item]:
        """Like `overlapping`, with the first and last item sliced to `pages`."""
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

    def starting_from(self, page: int, count: int) -> list[Item]:
        """Up to `count` items that start at `page` or behind it, in order."""
        return list(islice(self._items.between(page, PAGE_LIMIT), count))

    def head(self, pages: PageRange, items: int) -> PageRange:
        """The longest prefix of `pages` in which at most `items` items start, for walks that yield."""
        following = next(islice(self._items.between(pages.start, pages.end), items, None), None)
        return pages.slice(pages.start, pages.end if following is None else following.start)

    def insert(self, item: Item) -> None:
        """Insert an item, which the caller knows to overlap no other."""
        inserted = self.insert_if_free(item)
        assert inserted, f"{item} overlaps {self.first(item)}"

    def insert_if_free(self, item: Item) -> bool:
        """Insert an item unless it overlaps another; False if it does."""
        if self.touches(item):
            return False
        self.insert_unchecked(item)
        return True

    def insert_unchecked(self, item: Item) -> None:
        """Insert an item for which the caller has just looked up both neighbours: it overlaps none."""
        self._items[item.start] = item
        self._page_count += item.end - item.start

    def extend(self, item: Item, longer: Item) -> None:
        """Put `longer`, which starts where `item` does, in its place; the caller knows that the pages behind
        `item` are free."""
        self._items[item.start] = longer
        self._page_count += longer.end - item.end

    def drop_some(self) -> bool:
        """Remove some items, and False if there are none: a large map is freed in pieces. `page_count` is
        not kept."""
        return self._items.drop_some()

    def carve(self, pages: RangeItem | PageRange) -> list[Item]:
        """Remove everything in `pages`, slicing at both ends, and return what was removed."""
        removed = []
        first, last = pages.start, pages.end
        for item in self.overlapping(pages):
            start, end = item.start, item.end
            if first <= start:
                if end <= last:
                    del self._items[start]
                    removed.append(item)
                    self._page_count -= end - start
                    continue
                self._items.move(start, last, item.slice(last, end))
            else:
                self._items[start] = item.slice(start, first)
                if last < end:
                    self._items[last] = item.slice(last, end)
            start, end = max(start, first), min(end, last)
            removed.append(item.slice(start, end))
            self._page_count -= end - start
        return removed


def add_pages(pages: RangeMap[UaddrRange], more: UaddrRange) -> None:
    """Make `more` part of a set of pages, in which neighbours are one item."""
    before, after = pages.find(more.start - 1), pages.find(more.end)
    start = more.start if before is None else before.start
    end = more.end if after is None else after.end
    whole = UaddrRange(start=start, end=end)
    pages.carve(whole)
    pages.insert(whole)
