"""IntervalIndex against brute force, and how many ranges a search looks at."""

from __future__ import annotations

from itertools import islice

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fakes.counted_bounds import Counted
from fakes.drawn import ranges
from intercept_protocol.addresses import PAGE_LIMIT, PageRange
from interceptd.pages.interval_index import IntervalIndex

everything = PageRange(start=0, end=PAGE_LIMIT)
drawn_ranges = st.lists(ranges(24) | ranges(300) | st.just(everything))


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


@pytest.mark.parametrize("page_count", [1, 2, 3, 4, 5, 8, 9, 16, 17])
def test_a_page_finds_all_ranges_of_a_length_that_hold_it_and_no_other(page_count: int) -> None:
    drawn = [PageRange(start=start, end=start + page_count) for start in range(40)]
    index = indexed(drawn)
    for page in range(60):
        found = sorted(index.overlapping(PageRange(start=page, end=page + 1)))
        assert found == [place for place, pages in enumerate(drawn) if page in pages]


@pytest.mark.parametrize("page", [10, 11, 16, 22, 23])
def test_ranges_that_hold_one_page_are_found_while_several_and_while_one_is_left(page: int) -> None:
    drawn = {place: PageRange(start=10 + place, end=22 + place) for place in range(3)}
    index = indexed(list(drawn.values()))
    for removed in (1, 0, 2):
        index.remove(drawn.pop(removed), removed)
        found = sorted(index.overlapping(PageRange(start=page, end=page + 1)))
        assert found == [place for place, pages in drawn.items() if page in pages]


@pytest.mark.parametrize("aliases", [1, 3])
def test_what_is_not_in_the_index_cannot_be_removed(aliases: int) -> None:
    index = indexed([PageRange(start=4, end=8)] * aliases)
    with pytest.raises(AssertionError):
        index.remove(PageRange(start=4, end=8), 2 - aliases)


def test_an_index_that_was_emptied_keeps_nothing() -> None:
    """A size class that has no range any more would cost each search a look."""
    index = indexed([PageRange(start=8, end=9), PageRange(start=8, end=12)])
    for place, end in enumerate((9, 12)):
        index.remove(PageRange(start=8, end=end), place)
    assert (len(index), index._classes) == (0, {})


# ------------------------------------------------ how many ranges a search looks at


def looks(index: IntervalIndex[int], asked: PageRange, *, most: int | None = None) -> tuple[int, int]:
    """How many results a search has, and how many comparisons it makes for the first `most` of them."""
    counted = Counted(asked)
    results = sum(1 for _ in islice(index.overlapping(counted.pages), most))
    return results, counted.looks


PER_RESULT, PER_CLASS = 2, 6
"""Comparisons: of a result with both ends; of the three centres at the ends of the asked range."""
MANY = 2000
FAR = 1 << 30

LAYOUTS = {
    "equal": [PageRange(start=FAR, end=FAR + 12)] * MANY,
    "one end": [PageRange(start=FAR + place, end=FAR + MANY) for place in range(MANY)],
    "one start": [PageRange(start=FAR, end=FAR + place + 1) for place in range(MANY)],
    "nested": [PageRange(start=FAR - place, end=FAR + place + 1) for place in range(MANY)],
    "a staircase": [PageRange(start=FAR + place, end=FAR + MANY + place) for place in range(MANY)],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_search_does_not_look_at_the_many_ranges_beside_it(layout: str) -> None:
    drawn = LAYOUTS[layout]
    index = indexed(drawn)
    classes = {(pages.page_count - 1).bit_length() for pages in drawn}
    first, last = min(pages.start for pages in drawn), max(pages.end for pages in drawn)
    for start in (first - 1, first, FAR, FAR + MANY // 2, last - 1, last):
        asked = PageRange(start=start, end=start + 1)
        results, compared = looks(index, asked)
        assert results == sum(pages.overlaps(asked) for pages in drawn)
        assert compared <= PER_RESULT * results + PER_CLASS * len(classes)


@given(st.lists(ranges(300), max_size=4), ranges(300))
def test_a_search_looks_at_results_and_a_few_more(drawn: list[PageRange], asked: PageRange) -> None:
    drawn = drawn * 40
    classes = {(pages.page_count - 1).bit_length() for pages in drawn}
    results, compared = looks(indexed(drawn), asked)
    assert compared <= PER_RESULT * results + PER_CLASS * len(classes)


def test_a_search_that_stops_at_the_first_result_has_looked_for_no_other() -> None:
    index = indexed(LAYOUTS["equal"])
    assert looks(index, PageRange(start=FAR, end=FAR + 1), most=1) == (1, 2)


def test_a_search_looks_at_no_range_beside_the_centres_that_may_matter() -> None:
    """A range of eight pages at each multiple of four."""
    index = indexed([PageRange(start=start, end=start + 8) for start in range(0, 512, 4)])
    assert looks(index, PageRange(start=256, end=257)) == (2, 2 * PER_RESULT)
