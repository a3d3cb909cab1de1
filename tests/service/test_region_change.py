"""What a change of regions keeps, takes away and makes, against a plain table with an entry for each gfn."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from intercept_protocol.addresses import GfnRange, UaddrRange
from intercept_protocol.messages import RegionKind
from intercept_protocol.outcomes import Access
from interceptd.memory.region import KindOrigin, Piece, Region, RegionState
from interceptd.memory.region_change import RegionChange

SPACE = 24
Alike = tuple[int, RegionKind, KindOrigin, Access]
"""What makes two gfns alike: uaddr, kind, where it came from, and rights."""


def region(
    start: int,
    count: int,
    *,
    shift: int = 0,
    kind: RegionKind = RegionKind.MMIO,
    origin: KindOrigin = KindOrigin.STATED,
    access: Access = Access.READ,
    state: RegionState = RegionState.LIVE,
) -> Region:
    """Backed by the pages with the gfns' own numbers, or by those `shift` behind."""
    uaddrs = UaddrRange.at_page(start + shift, count)
    return Region(GfnRange.of(start, count), uaddrs, kind, origin, access, state)


@st.composite
def disjoint(draw: st.DrawFn) -> list[Region]:
    """Regions that seldom differ in more than one thing, in any order."""
    cuts = sorted(draw(st.sets(st.integers(0, SPACE), max_size=8)))
    regions = [
        region(
            start,
            end - start,
            shift=draw(st.sampled_from([0, 0, 0, 1])),
            kind=draw(st.sampled_from([RegionKind.MMIO, RegionKind.MMIO, RegionKind.PINNED])),
            origin=draw(st.sampled_from([KindOrigin.STATED, KindOrigin.STATED, KindOrigin.INFERRED])),
            access=draw(st.sampled_from([Access.READ, Access.READ, Access.READ | Access.WRITE])),
            state=draw(st.sampled_from([RegionState.LIVE, RegionState.LIVE, RegionState.DANGLING])),
        )
        for start, end in pairwise(cuts)
        if draw(st.booleans())
    ]
    return draw(st.permutations(regions))


def table(regions: Iterable[Region]) -> dict[int, Region]:
    return {gfn: each for each in regions for gfn in range(each.gfns.start, each.gfns.end)}


def alike(of: Region, gfn: int) -> Alike:
    return of.uaddrs_of(GfnRange.of(gfn, 1)).start, of.kind, of.kind_origin, of.access


def pages(pieces: Iterable[Piece]) -> dict[int, Region]:
    """Like `table`; every piece has pages, which nobody else has and its region does."""
    found: dict[int, Region] = {}
    for each, gfns in pieces:
        assert gfns.page_count > 0
        for gfn in range(gfns.start, gfns.end):
            assert gfn not in found
            assert gfn in each.gfns
            found[gfn] = each
    return found


@given(disjoint(), disjoint())
def test_every_gfn_is_kept_or_goes_or_comes_as_the_two_regions_that_have_it_say(
    old: list[Region], new: list[Region]
) -> None:
    before, after = table(old), table(new)
    same = {
        gfn
        for gfn in before.keys() & after.keys()
        if alike(before[gfn], gfn) == alike(after[gfn], gfn) and before[gfn].state is RegionState.LIVE
    }
    change = RegionChange(old, new)
    assert pages((each.old, each.gfns) for each in change.kept) == {gfn: before[gfn] for gfn in same}
    assert pages((each.new, each.gfns) for each in change.kept) == {gfn: after[gfn] for gfn in same}
    assert pages(change.going) == {gfn: before[gfn] for gfn in before.keys() - same}
    assert pages(change.coming) == {gfn: after[gfn] for gfn in after.keys() - same}
    assert {gfn for gfns in change.changing for gfn in range(gfns.start, gfns.end)} == (
        before.keys() | after.keys()
    ) - same


@given(disjoint(), disjoint())
def test_what_changes_is_sorted_and_in_as_few_pieces_as_can_be(old: list[Region], new: list[Region]) -> None:
    change = RegionChange(old, new)
    assert all(before.end < after.start for before, after in pairwise(change.changing))
    for pieces in (change.going, change.coming):
        assert all(
            before.end < after.start or of_one is not of_other
            for (of_one, before), (of_other, after) in pairwise(pieces)
        )


def test_a_hole_in_a_region_keeps_both_sides() -> None:
    whole, left, right = region(0, 9), region(0, 3), region(5, 4)
    change = RegionChange([whole], [right, left])
    assert change.kept == [(whole, left, left.gfns), (whole, right, right.gfns)]
    assert (change.going, change.coming) == ([(whole, GfnRange.of(3, 2))], [])


@pytest.mark.parametrize(
    "other",
    [
        region(0, 4, shift=1),
        region(0, 4, kind=RegionKind.MOVABLE),
        region(0, 4, origin=KindOrigin.INFERRED),
        region(0, 4, access=Access.READ | Access.WRITE),
    ],
    ids=["uaddr", "kind", "origin", "rights"],
)
def test_a_region_that_gives_something_else_keeps_nothing(other: Region) -> None:
    change = RegionChange([region(0, 4)], [other])
    assert (change.kept, change.changing) == ([], [other.gfns])


def test_regions_that_are_alike_and_do_not_meet_keep_nothing() -> None:
    change = RegionChange([region(0, 4)], [region(4, 4)])
    assert (change.kept, change.changing) == ([], [GfnRange.of(0, 8)])


def test_nothing_of_a_dangling_region_is_kept() -> None:
    dangling = region(0, 4, kind=RegionKind.PINNED, state=RegionState.DANGLING)
    change = RegionChange([dangling], [region(0, 4, kind=RegionKind.PINNED)])
    assert (change.kept, change.going) == ([], [(dangling, dangling.gfns)])
