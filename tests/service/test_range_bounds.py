"""RangeBounds against brute force, and how often it compares."""

from __future__ import annotations

from hypothesis import assume, given
from hypothesis import strategies as st

from fakes.counted_bounds import Bound, Counted
from fakes.drawn import ranges
from intercept_protocol.addresses import PageRange
from interceptd.pages.range_bounds import RangeBounds

drawn_ranges = st.lists(st.tuples(ranges(), st.booleans()), max_size=12)


def bounds_and_oracle(drawn: list[tuple[PageRange, bool]]) -> tuple[RangeBounds, list[PageRange]]:
    """All are added; those that are not to stay are removed again."""
    bounds = RangeBounds()
    for pages, _ in drawn:
        bounds.add(pages)
    for pages, stays in drawn:
        if not stays:
            bounds.remove(pages)
    return bounds, [pages for pages, stays in drawn if stays]


@given(drawn_ranges, ranges())
def test_touches_agrees_with_a_full_scan(drawn: list[tuple[PageRange, bool]], asked: PageRange) -> None:
    bounds, kept = bounds_and_oracle(drawn)
    assert bounds.touches(asked) == any(pages.overlaps(asked) for pages in kept)


@given(drawn_ranges, ranges(), st.data())
def test_a_gap_reaches_to_the_nearest_ranges_on_both_sides(
    drawn: list[tuple[PageRange, bool]], asked: PageRange, data: st.DataObject
) -> None:
    bounds, kept = bounds_and_oracle(drawn)
    page = data.draw(st.integers(asked.start, asked.end - 1))
    assume(not any(page in pages for pages in kept))
    before = [pages.end for pages in kept if pages.end <= page]
    behind = [pages.start for pages in kept if pages.start > page]
    expected = PageRange(start=max([asked.start, *before]), end=min([asked.end, *behind]))
    assert bounds.gap(page, asked) == expected


def test_a_look_among_many_ranges_compares_with_few_of_them() -> None:
    bounds = RangeBounds()
    for place in range(1024):
        bounds.add(PageRange(start=place, end=1024 + place))
    asked, page = Counted(PageRange(start=2048, end=2049)), Bound(2048)
    assert not bounds.touches(asked.pages)
    assert bounds.gap(page, PageRange(start=0, end=4096)) == PageRange(start=2047, end=4096)
    assert asked.looks + page.compared <= 4 * 11
