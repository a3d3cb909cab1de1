"""IntervalIndex against brute force."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fakes.drawn import ranges
from intercept_protocol.addresses import PAGE_LIMIT, PageRange
from interceptd.pages.interval_index import IntervalIndex

everything = PageRange(start=0, end=PAGE_LIMIT)
drawn_ranges = st.lists(ranges(300) | st.just(everything))


def indexed(drawn: list[PageRange]) -> IntervalIndex[int]:
    """Each range filed under its place in the list, equal ones as aliases."""
    index: IntervalIndex[int] = IntervalIndex()
    for place, pages in enumerate(drawn):
        index.add(pages, place, place)
    return index


@given(drawn_ranges, ranges(300))
def test_overlapping_agrees_with_a_full_scan(drawn: list[PageRange], asked: PageRange) -> None:
    expected = [place for place, pages in enumerate(drawn) if pages.overlaps(asked)]
    assert sorted(indexed(drawn).overlapping(asked)) == expected


@given(drawn_ranges, ranges(300), st.sets(st.integers(0, 40)))
def test_removed_ranges_are_found_no_more_and_the_others_still(
    drawn: list[PageRange], asked: PageRange, removed: set[int]
) -> None:
    index = indexed(drawn)
    for place in removed & set(range(len(drawn))):
        index.remove(drawn[place], place)
    kept = [place for place in range(len(drawn)) if place not in removed]
    assert sorted(index.overlapping(asked)) == [place for place in kept if drawn[place].overlaps(asked)]
    assert len(index) == len(kept)


def test_equal_ranges_are_distinguished_by_their_alias() -> None:
    index = indexed([PageRange(start=4, end=8), PageRange(start=4, end=8)])
    index.remove(PageRange(start=4, end=8), 0)
    assert list(index.overlapping(PageRange(start=5, end=6))) == [1]


def test_a_range_that_ends_where_the_asked_one_starts_is_not_found() -> None:
    index = indexed([PageRange(start=0, end=4), PageRange(start=8, end=9)])
    assert list(index.overlapping(PageRange(start=4, end=8))) == []


@pytest.mark.parametrize("page_count", [1, 2, 3, 4, 5, 8, 9, 16, 17])
def test_a_range_of_any_length_is_found_by_its_ends_and_not_by_the_pages_beside(page_count: int) -> None:
    """Lengths around the powers of two, where the size classes end."""
    end = 100 + page_count
    index = indexed([PageRange(start=100, end=end)])
    asked = [PageRange(start=page, end=page + 1) for page in (99, 100, end - 1, end)]
    assert [list(index.overlapping(page)) for page in asked] == [[], [0], [0], []]


def test_a_range_that_starts_where_the_asked_one_ends_is_not_found_by_its_lowest_alias() -> None:
    index: IntervalIndex[str] = IntervalIndex()
    index.add(PageRange(start=8, end=16), 0, "behind")
    assert list(index.overlapping(PageRange(start=0, end=8))) == []


def test_an_index_that_was_emptied_takes_ranges_again() -> None:
    index = indexed([PageRange(start=0, end=4)])
    index.remove(PageRange(start=0, end=4), 0)
    index.add(PageRange(start=0, end=4), 0, 7)
    assert list(index.overlapping(PageRange(start=0, end=1))) == [7]
