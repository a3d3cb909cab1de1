"""Mappings and frames: values that can be cut without losing step."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from fakes.drawn import ranges
from intercept_protocol.addresses import GfnRange, PageRange
from intercept_protocol.outcomes import Access
from interceptd.mapping import HOST_BACKING, Cache, Frame, Mapping

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
    assert part.gfns == GfnRange(100 + pages.start, 100 + pages.end)


def test_slice_of_no_access_has_no_frame() -> None:
    waiting = Mapping(0, 8, None, 500, Access.NONE)
    assert waiting.slice(2, 4) == Mapping(2, 4, None, 502, Access.NONE)


@given(ranges())
def test_a_mapping_serves_every_part_of_itself(pages: PageRange) -> None:
    assert WHOLE.serves(cut(pages))


def test_a_mapping_serves_what_wants_fewer_rights() -> None:
    assert WHOLE.serves(replace(cut(PageRange(3, 5)), access=Access.READ))


def test_a_mapping_does_not_serve_what_wants_more_rights() -> None:
    assert not WHOLE.serves(replace(cut(PageRange(3, 5)), access=Access.READ | Access.EXECUTE))


def test_a_mapping_does_not_serve_what_wants_another_frame() -> None:
    assert not WHOLE.serves(replace(cut(PageRange(3, 5)), frame=Frame(HOST_BACKING, 7004)))


def test_a_frame_of_another_backing_is_another_frame() -> None:
    assert not WHOLE.serves(replace(WHOLE, frame=Frame("file", 7000)))
