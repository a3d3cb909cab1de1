"""Ranges of pages: half-open, never empty, never wrapping."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from intercept_protocol.addresses import (
    PAGE_LIMIT,
    GfnRange,
    PageRange,
    PfnRange,
    RangeError,
    UaddrRange,
    uaddr_page,
)

spans = st.tuples(st.integers(0, 40), st.integers(1, 20))


@pytest.mark.parametrize("page_count", [0, -1])
def test_of_refuses_an_empty_range_and_names_page_count(page_count: int) -> None:
    with pytest.raises(RangeError, match=f"got {page_count}$") as caught:
        GfnRange.of(5, page_count)

    assert caught.value.field == "page_count"


def test_of_takes_the_last_page_there_is() -> None:
    assert GfnRange.of(PAGE_LIMIT - 1, 1).end == 1 << 52


@pytest.mark.parametrize(("start", "page_count"), [(PAGE_LIMIT - 1, 2), (1, PAGE_LIMIT), (0, 2**64 - 1)])
def test_hazard_i_of_refuses_a_range_that_wraps_and_names_page_count(start: int, page_count: int) -> None:
    with pytest.raises(RangeError, match="end beyond page 0x10000000000000") as caught:
        GfnRange.of(start, page_count)

    assert caught.value.field == "page_count"


@pytest.mark.parametrize("start", [-1, PAGE_LIMIT, 2**64 - 1])
@pytest.mark.parametrize(
    ("kind", "field"), [(GfnRange, "start_gfn"), (PfnRange, "start_pfn"), (UaddrRange, "start_uaddr")]
)
def test_of_refuses_a_start_outside_the_address_space_and_names_it(
    kind: type[PageRange], field: str, start: int
) -> None:
    with pytest.raises(RangeError, match="lies outside") as caught:
        kind.at_page(start, 1)

    assert caught.value.field == field


@pytest.mark.parametrize("kind", [GfnRange, PfnRange, UaddrRange])
def test_bare_numbers_make_no_range_because_they_read_as_start_and_length(kind: type[PageRange]) -> None:
    """`UaddrRange(0, 64 * 4096)` was a GiB."""
    make: Callable[..., PageRange] = kind
    with pytest.raises(TypeError, match="positional"):
        make(0, 64 * 4096)


def test_of_takes_the_first_page_and_a_page_count() -> None:
    assert GfnRange.of(7, 3) == GfnRange(start=7, end=10)
    assert PfnRange.of(7, 3) == PfnRange(start=7, end=10)


def test_of_bytes_counts_in_pages() -> None:
    assert UaddrRange.of_bytes(0x7000, 0x3000) == UaddrRange(start=7, end=10)


@pytest.mark.parametrize("length", [0, -4096, 1, 4095, 4097])
def test_of_bytes_refuses_other_than_whole_pages_and_names_length(length: int) -> None:
    with pytest.raises(RangeError, match="whole pages") as caught:
        UaddrRange.of_bytes(0x7000, length)

    assert caught.value.field == "length"


def test_of_bytes_takes_a_range_that_ends_at_2_to_the_64() -> None:
    assert UaddrRange.of_bytes(2**64 - 0x2000, 0x2000).end == PAGE_LIMIT


def test_hazard_i_of_bytes_refuses_a_range_that_wraps_and_names_length() -> None:
    with pytest.raises(RangeError, match="end beyond") as caught:
        UaddrRange.of_bytes(2**64 - 0x1000, 0x2000)

    assert caught.value.field == "length"


def test_of_pages_takes_a_byte_address_and_a_page_count() -> None:
    assert UaddrRange.of_pages(0x7000, 3) == UaddrRange(start=7, end=10)


def test_hazard_i_of_pages_refuses_a_range_that_wraps_and_names_page_count() -> None:
    with pytest.raises(RangeError, match="end beyond") as caught:
        UaddrRange.of_pages(2**64 - 0x1000, 2)

    assert caught.value.field == "page_count"


@pytest.mark.parametrize("uaddr", [1, 0x7FFF, 2**64 - 1])
def test_misaligned_uaddr_is_refused_and_names_start_uaddr(uaddr: int) -> None:
    with pytest.raises(RangeError, match="multiple of 4096") as caught:
        uaddr_page(uaddr)

    assert caught.value.field == "start_uaddr"


def test_uaddr_range_gives_back_bytes() -> None:
    range_ = UaddrRange(start=7, end=10)

    assert (range_.start_uaddr, range_.length) == (0x7000, 0x3000)


def test_ranges_print_half_open_in_their_own_unit() -> None:
    assert str(GfnRange(start=0x100, end=0x200)) == "[0x100, 0x200)"
    assert str(UaddrRange(start=0x100, end=0x200)) == "[0x100000, 0x200000)"


def test_ranges_of_two_address_spaces_are_never_equal() -> None:
    gfns: PageRange = GfnRange(start=1, end=2)
    uaddrs: PageRange = UaddrRange(start=1, end=2)

    assert gfns != uaddrs


def test_slice_keeps_the_kind_of_range() -> None:
    assert GfnRange(start=0, end=9).slice(3, 5) == GfnRange(start=3, end=5)


@given(spans, spans)
def test_ranges_relate_as_their_sets_of_pages_do(left: tuple[int, int], right: tuple[int, int]) -> None:
    one, other = PageRange.at_page(*left), PageRange.at_page(*right)
    pages, others = set(range(one.start, one.end)), set(range(other.start, other.end))

    clipped = one.clip(other)

    assert one.page_count == len(pages)
    assert one.overlaps(other) == bool(pages & others)
    assert one.covers(other) == (others <= pages)
    assert {page for page in range(70) if page in one} == pages
    assert set(range(clipped.start, clipped.end) if clipped else ()) == pages & others
