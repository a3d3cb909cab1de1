"""The region list: I3, limits, and look-up by gfn and by uaddr."""

from __future__ import annotations

import errno
from contextlib import suppress
from itertools import compress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fakes.drawn import SPACE, ranges
from intercept_protocol.addresses import PAGE_LIMIT, GfnRange, PageRange, UaddrRange
from intercept_protocol.errors import WireError
from intercept_protocol.messages import RegionKind
from intercept_protocol.outcomes import Access
from interceptd.memory.region import KindOrigin, Region
from interceptd.memory.region_list import RegionList


def region(gfns: PageRange, start_uaddr_page: int = 0) -> Region:
    return Region(
        GfnRange(start=gfns.start, end=gfns.end),
        UaddrRange(start=start_uaddr_page, end=start_uaddr_page + gfns.page_count),
        RegionKind.MMIO,
        KindOrigin.STATED,
        Access.READ,
    )


def listed(drawn: list[tuple[PageRange, int]]) -> tuple[RegionList, list[Region]]:
    """All that can be added in turn, and what an oracle with a plain list accepts."""
    regions = RegionList(limit=lambda: 1000)
    oracle: list[Region] = []
    for gfns, uaddr in drawn:
        candidate = region(gfns, uaddr)
        with suppress(WireError):
            regions.add(candidate)
        oracle += [] if any(held.gfns.overlaps(gfns) for held in oracle) else [candidate]
    return regions, sorted(oracle, key=lambda held: held.gfns.start)


drawn_regions = st.lists(st.tuples(ranges(), st.integers(0, SPACE)))


@given(drawn_regions)
def test_i3_regions_stay_sorted_and_disjoint_and_none_is_refused_without_overlap(
    drawn: list[tuple[PageRange, int]],
) -> None:
    regions, oracle = listed(drawn)
    assert list(regions) == oracle


@given(drawn_regions, st.integers(0, SPACE))
def test_find_answers_with_the_region_that_covers_the_gfn(
    drawn: list[tuple[PageRange, int]], gfn: int
) -> None:
    regions, oracle = listed(drawn)
    assert regions.find(gfn) is next((held for held in oracle if gfn in held.gfns), None)


@given(drawn_regions, st.integers(0, SPACE))
def test_starting_from_gives_the_regions_that_begin_there_or_behind(
    drawn: list[tuple[PageRange, int]], gfn: int
) -> None:
    regions, oracle = listed(drawn)
    assert list(regions.starting_from(gfn)) == [held for held in oracle if held.gfns.start >= gfn]


@given(drawn_regions, ranges())
def test_behind_finds_every_region_of_a_uaddr_aliases_included(
    drawn: list[tuple[PageRange, int]], asked: PageRange
) -> None:
    regions, oracle = listed(drawn)
    found = sorted(
        regions.behind(UaddrRange(start=asked.start, end=asked.end)), key=lambda region: region.gfns.start
    )
    assert found == [held for held in oracle if held.uaddrs.overlaps(asked)]


@given(drawn_regions, st.data())
def test_removed_regions_are_found_from_neither_side(
    drawn: list[tuple[PageRange, int]], data: st.DataObject
) -> None:
    regions, oracle = listed(drawn)
    stays = data.draw(st.lists(st.booleans(), min_size=len(oracle), max_size=len(oracle)))
    kept = list(compress(oracle, stays))
    for held in compress(oracle, (not stay for stay in stays)):
        regions.remove(held)
    assert list(regions) == kept
    assert set(regions.behind(UaddrRange(start=0, end=PAGE_LIMIT))) == set(kept)


def test_add_over_another_region_is_eexist_and_names_both() -> None:
    regions = RegionList(limit=lambda: 10)
    regions.add(region(PageRange(start=0x180, end=0x280)))
    with pytest.raises(WireError, match=r"region \[0x100, 0x200\) overlaps \[0x180, 0x280\)") as refused:
        regions.add(region(PageRange(start=0x100, end=0x200)))
    assert refused.value.number == errno.EEXIST
    assert refused.value.details == {"start_gfn": 0x180, "page_count": 0x100}


def test_adjacent_regions_do_not_overlap() -> None:
    regions = RegionList(limit=lambda: 10)
    regions.add(region(PageRange(start=0x180, end=0x280)))
    regions.add(region(PageRange(start=0x100, end=0x180)))
    regions.add(region(PageRange(start=0x280, end=0x281)))
    assert len(regions) == 3


def test_add_at_the_limit_is_enospc_and_names_the_limit() -> None:
    regions = RegionList(limit=lambda: 1)
    regions.add(region(PageRange(start=0, end=1)))
    with pytest.raises(WireError) as refused:
        regions.add(region(PageRange(start=1, end=2)))
    assert refused.value.number == errno.ENOSPC
    assert refused.value.details == {"limit": "regions_per_partition"}


def with_regions(*starts: int, limit: int) -> tuple[RegionList, list[Region]]:
    """Regions of four gfns each."""
    regions = RegionList(limit=lambda: limit)
    for start in starts:
        regions.add(region(PageRange(start=start, end=start + 4)))
    return regions, list(regions)


def test_a_change_may_reach_the_limit_itself_and_what_it_removes_makes_room() -> None:
    regions, (first, second, _) = with_regions(0, 8, 16, limit=4)
    new = [region(PageRange(start=start, end=start + 1)) for start in (100, 101, 102, 103)]
    regions.require_room(new[:3], {first, second})
    with pytest.raises(WireError) as refused:
        regions.require_room(new, {first, second})
    assert refused.value.details == {"limit": "regions_per_partition"}


def test_a_change_may_go_from_what_stays_to_behind_the_start_of_what_it_removes() -> None:
    regions, (_, removed) = with_regions(0, 8, limit=2)
    new = [region(PageRange(start=4, end=12))]
    regions.require_room(new, {removed})
    with pytest.raises(WireError) as refused:
        regions.require_room(new, set())
    assert refused.value.number == errno.EEXIST


def test_exactly_with_another_start_is_enoent() -> None:
    regions = RegionList(limit=lambda: 1)
    regions.add(region(PageRange(start=0, end=8)))
    with pytest.raises(WireError) as refused:
        regions.exactly(GfnRange(start=1, end=8), UaddrRange(start=0, end=7))
    assert (refused.value.number, refused.value.details) == (errno.ENOENT, {"start_gfn": 1})


@pytest.mark.parametrize(
    ("gfns", "uaddrs", "field"),
    [
        (GfnRange(start=0, end=7), UaddrRange(start=0, end=7), "page_count"),
        (GfnRange(start=0, end=8), UaddrRange(start=1, end=9), "start_uaddr"),
    ],
)
def test_exactly_with_another_extent_is_einval_and_names_the_field(
    gfns: GfnRange, uaddrs: UaddrRange, field: str
) -> None:
    regions = RegionList(limit=lambda: 1)
    regions.add(region(PageRange(start=0, end=8)))
    with pytest.raises(WireError) as refused:
        regions.exactly(gfns, uaddrs)
    assert (refused.value.number, refused.value.details["field"]) == (errno.EINVAL, field)
