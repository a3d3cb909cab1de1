"""RangeMap against a dict of pages."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fakes.drawn import SPACE, ranges
from intercept_protocol.addresses import PageRange
from interceptd.pages import ordered_map
from interceptd.pages.range_map import RangeMap


@dataclass(frozen=True)
class Item:
    """Pages [start, end); page `start + k` holds `first + k`."""

    start: int
    end: int
    first: int = 0

    def slice(self, start: int, end: int) -> Item:
        return replace(self, start=start, end=end, first=self.first + start - self.start)


def pages_of(items: list[Item]) -> dict[int, int]:
    return {page: item.first + page - item.start for item in items for page in range(item.start, item.end)}


def filled(drawn: list[PageRange]) -> tuple[RangeMap[Item], dict[int, int]]:
    """Each range written over those before, in the map and in its oracle."""
    items: RangeMap[Item] = RangeMap()
    oracle: dict[int, int] = {}
    for number, pages in enumerate(drawn):
        item = Item(pages.start, pages.end, 1000 * number)
        items.carve(item)
        items.insert(item)
        oracle |= pages_of([item])
    return items, oracle


@given(st.lists(ranges()))
def test_any_writes_agree_with_a_dict(drawn: list[PageRange]) -> None:
    items, oracle = filled(drawn)
    assert pages_of(list(items)) == oracle
    assert items.page_count == len(oracle)


@given(st.lists(ranges()))
def test_range_map_after_any_writes_is_ordered_and_disjoint(drawn: list[PageRange]) -> None:
    held = list(filled(drawn)[0])
    assert all(before.end <= after.start for before, after in pairwise(held))


@given(st.lists(ranges()), st.integers(0, SPACE))
def test_find_answers_with_the_item_that_occupies_the_page(drawn: list[PageRange], page: int) -> None:
    items, oracle = filled(drawn)
    found = items.find(page)
    assert (None if found is None else pages_of([found])[page]) == oracle.get(page)


@given(st.lists(ranges()), ranges())
def test_overlapping_lists_exactly_the_items_that_touch(drawn: list[PageRange], asked: PageRange) -> None:
    items, _ = filled(drawn)
    assert items.overlapping(asked) == [
        item for item in items if item.start < asked.end and asked.start < item.end
    ]


@given(st.lists(ranges()), ranges())
def test_clipped_and_gaps_divide_the_range_between_them(drawn: list[PageRange], asked: PageRange) -> None:
    items, oracle = filled(drawn)
    gaps = {page for start, end in items.gaps(asked) for page in range(start, end)}
    clipped = pages_of(items.clipped(asked))
    assert clipped == {page: value for page, value in oracle.items() if page in asked}
    assert gaps == set(range(asked.start, asked.end)) - oracle.keys()


@given(st.lists(ranges()), ranges())
def test_carve_takes_exactly_the_range_and_leaves_the_rest(drawn: list[PageRange], asked: PageRange) -> None:
    items, oracle = filled(drawn)
    taken = pages_of(items.carve(asked))
    assert taken == {page: value for page, value in oracle.items() if page in asked}
    assert pages_of(list(items)) == {page: value for page, value in oracle.items() if page not in asked}
    assert items.page_count == len(oracle) - len(taken)


@given(st.lists(ranges()), ranges(), st.integers(1, 5))
def test_head_holds_few_beginnings_and_walks_to_the_end(
    drawn: list[PageRange], asked: PageRange, few: int
) -> None:
    items, _ = filled(drawn)
    head = items.head(asked, few)
    begun = [item for item in items if item.start in head]
    assert head.start == asked.start < head.end <= asked.end
    assert len(begun) <= few
    assert head.end == asked.end or len(begun) == few


@given(st.lists(ranges()), st.integers(0, SPACE), st.integers(0, 5))
def test_starting_from_lists_the_next_few_that_begin_there_or_behind(
    drawn: list[PageRange], page: int, few: int
) -> None:
    items, _ = filled(drawn)
    assert items.starting_from(page, few) == [item for item in items if item.start >= page][:few]


def test_starting_from_looks_at_few_chunks_however_many_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """A page of a list costs the same wherever it starts."""
    monkeypatch.setattr(ordered_map, "CHUNK", 8)
    items: RangeMap[Item] = RangeMap()
    for start in range(4000):
        items.insert(Item(start, start + 1))
    looked_at = CountedReads(items._items._values)
    items._items._values = looked_at
    assert [item.start for item in items.starting_from(2000, 8)] == [*range(2000, 2008)]
    assert looked_at.reads <= 4


class CountedReads(list[list[Item]]):
    """How many of the elements are read."""

    reads = 0

    def __getitem__(self, at: Any) -> Any:
        self.reads += 1
        return super().__getitem__(at)

    def __iter__(self) -> Iterator[list[Item]]:
        self.reads += len(self)
        return super().__iter__()


def test_insert_over_another_item_is_refused_as_our_own_mistake() -> None:
    items: RangeMap[Item] = RangeMap()
    items.insert(Item(0, 4))
    with pytest.raises(AssertionError, match="overlaps"):
        items.insert(Item(3, 5))


def test_uncut_items_keep_their_identity_through_a_carve_elsewhere() -> None:
    items: RangeMap[Item] = RangeMap()
    kept = Item(0, 4)
    items.insert(kept)
    items.insert(Item(4, 8))
    items.carve(PageRange(start=4, end=8))
    assert items.find(2) is kept


@pytest.mark.parametrize(
    ("asked", "few", "end"), [((0, 9), 2, 4), ((1, 9), 2, 6), ((0, 6), 3, 6), ((0, 9), 9, 9)]
)
def test_head_ends_where_one_item_too_many_begins(asked: tuple[int, int], few: int, end: int) -> None:
    items: RangeMap[Item] = RangeMap()
    for start in (0, 2, 4, 6):
        items.insert(Item(start, start + 2))
    assert items.head(PageRange(start=asked[0], end=asked[1]), few) == PageRange(start=asked[0], end=end)


@pytest.mark.parametrize("beside", [Item(0, 4), Item(8, 9)])
def test_an_item_beside_the_range_neither_overlaps_it_nor_is_cut(beside: Item) -> None:
    items: RangeMap[Item] = RangeMap()
    items.insert(beside)
    asked = PageRange(start=4, end=8)
    assert (items.overlapping(asked), items.gaps(asked), items.carve(asked)) == ([], [(4, 8)], [])
    assert (list(items), items.page_count) == ([beside], beside.end - beside.start)


def test_a_carve_out_of_the_middle_leaves_both_ends_in_step() -> None:
    items: RangeMap[Item] = RangeMap()
    items.insert(Item(0, 9, first=100))
    taken = items.carve(PageRange(start=3, end=5))
    assert (taken, list(items)) == ([Item(3, 5, 103)], [Item(0, 3, 100), Item(5, 9, 105)])
    assert items.page_count == 7
