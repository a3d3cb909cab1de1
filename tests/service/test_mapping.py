"""Mappings and frames: cutting one keeps every page at its frame."""

from __future__ import annotations

from itertools import permutations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from fakes.drawn import ranges
from intercept_protocol.addresses import GfnRange, PageRange
from intercept_protocol.outcomes import Access
from interceptd.pages.mapping import HOST_BACKING, Cache, Frame, Mapping, insert_joined
from interceptd.pages.range_map import RangeMap

WHOLE = Mapping(100, 148, Frame(HOST_BACKING, 7000), 500, Access.READ | Access.WRITE, Cache.NOT_CACHED)


def cut(pages: PageRange) -> Mapping:
    return WHOLE.slice(100 + pages.start, 100 + pages.end)


@given(ranges(), st.integers(0, 47))
def test_slice_of_a_mapping_keeps_frame_and_uaddr_in_step_with_the_gfn(pages: PageRange, page: int) -> None:
    part = cut(pages)
    assert part.frame == Frame(HOST_BACKING, 7000 + pages.start)
    assert part.start_uaddr_page == 500 + pages.start
    assert part.frame_at(100 + page) == WHOLE.frame_at(100 + page)


@given(ranges())
def test_slice_of_a_mapping_keeps_access_and_cache(pages: PageRange) -> None:
    part = cut(pages)
    assert (part.access, part.cache) == (WHOLE.access, WHOLE.cache)
    assert part.gfns == GfnRange(start=100 + pages.start, end=100 + pages.end)


def test_slice_of_no_access_has_no_frame() -> None:
    waiting = Mapping(0, 8, None, 500, Access.NONE)
    assert waiting.slice(2, 4) == Mapping(2, 4, None, 502, Access.NONE)


@given(ranges())
def test_a_mapping_serves_every_part_of_itself(pages: PageRange) -> None:
    assert WHOLE.serves(cut(pages))


def test_a_mapping_serves_accesses_that_need_fewer_rights() -> None:
    assert WHOLE.serves(replace(cut(PageRange(start=3, end=5)), access=Access.READ))


def test_a_mapping_does_not_serve_accesses_that_need_more_rights() -> None:
    assert not WHOLE.serves(replace(cut(PageRange(start=3, end=5)), access=Access.READ | Access.EXECUTE))


def test_a_mapping_does_not_serve_a_different_frame() -> None:
    assert not WHOLE.serves(replace(cut(PageRange(start=3, end=5)), frame=Frame(HOST_BACKING, 7004)))


def test_a_frame_of_another_backing_is_another_frame() -> None:
    assert not WHOLE.serves(replace(WHOLE, frame=Frame("file", 7000)))


# ------------------------------------------------ joining


NEXT = Mapping(148, 150, Frame(HOST_BACKING, 7048), 548, WHOLE.access, Cache.NOT_CACHED)
"""What follows `WHOLE` in everything."""


def test_a_mapping_is_continued_by_an_adjacent_one() -> None:
    assert WHOLE.continued_by(NEXT)


@pytest.mark.parametrize(
    "other",
    [
        replace(NEXT, start=149),
        replace(NEXT, access=Access.READ),
        replace(NEXT, cache=Cache.NORMAL),
        replace(NEXT, start_uaddr_page=549),
        replace(NEXT, start_uaddr_page=500),
        replace(NEXT, frame=Frame(HOST_BACKING, 7049)),
        replace(NEXT, frame=Frame("file", 7048)),
    ],
)
def test_a_mapping_is_not_continued_by_one_that_differs_in_any_way(other: Mapping) -> None:
    assert not WHOLE.continued_by(other)


@pytest.mark.parametrize("order", list(permutations(range(3))))
def test_mappings_that_continue_each_other_become_one_in_whatever_order_they_come(
    order: tuple[int, ...],
) -> None:
    parts = [cut(PageRange(start=0, end=8)), cut(PageRange(start=8, end=9)), cut(PageRange(start=9, end=48))]
    mappings: RangeMap[Mapping] = RangeMap()
    for part in order:
        insert_joined(mappings, parts[part])
    assert list(mappings) == [WHOLE]


def test_neighbours_that_do_not_continue_each_other_stay_apart() -> None:
    parts = [
        cut(PageRange(start=0, end=8)),
        replace(cut(PageRange(start=8, end=9)), access=Access.READ),
        cut(PageRange(start=9, end=48)),
    ]
    mappings: RangeMap[Mapping] = RangeMap()
    for part in (parts[0], parts[2], parts[1]):
        insert_joined(mappings, part)
    assert list(mappings) == parts


def test_mappings_with_a_page_between_them_stay_apart() -> None:
    parts = [cut(PageRange(start=0, end=8)), cut(PageRange(start=9, end=48))]
    mappings: RangeMap[Mapping] = RangeMap()
    for part in parts:
        insert_joined(mappings, part)
    assert list(mappings) == parts
