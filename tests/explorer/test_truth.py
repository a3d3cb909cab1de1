"""The reference: its verdicts on a reached page and on a forwarded access."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace

import pytest

from explorer.facts import Reached
from explorer.rules import Rule
from explorer.script import RW, Bar, Pages
from explorer.truth import Truth
from intercept_protocol.messages import RegionKind
from intercept_protocol.outcomes import Access, Answer

ALL = Pages(0, 16)
BAR = Bar("BAR", gfn=100, count=16, page=0)
PINNED = Bar("RAM", gfn=100, count=16, page=0, kind=RegionKind.PINNED)
MOVED = Bar("BAR", gfn=200, count=16, page=0)
ROM = Bar("ROM", gfn=100, count=16, page=32, access=Access.READ)
PFN, ROM_PFN = 1000, 3000


class Clock:
    moment = 0

    def __call__(self) -> int:
        self.moment += 1
        return self.moment


@pytest.fixture
def truth() -> Truth:
    made = Truth(Clock())
    made.mapped(ALL, PFN, RW)
    return made


def rule(truth: Truth, gfn: int = 105, pfn: int = PFN + 5, access: Access = RW, at: int = 0) -> Rule | None:
    verdict = truth.wrong(Reached(gfn, pfn, access, at, mapped_for=None))
    return None if verdict is None else verdict[0]


def test_a_page_at_the_frame_of_its_own_uaddr_is_right(truth: Truth) -> None:
    truth.added(BAR)
    assert rule(truth) is None


def test_a_page_at_another_frame_is_wrong(truth: Truth) -> None:
    truth.added(BAR)
    assert rule(truth, pfn=PFN + 6) is Rule.WRONG_FRAME


def test_a_page_without_a_vma_is_extrapolated(truth: Truth) -> None:
    truth.added(Bar("long", 100, 20, 0))
    assert rule(truth, gfn=118, pfn=PFN + 18) is Rule.EXTRAPOLATED


def test_rights_beyond_the_vmas_are_excess(truth: Truth) -> None:
    truth.added(BAR)
    assert rule(truth, access=RW | Access.EXECUTE) is Rule.EXCESS


def test_a_page_with_a_call_in_progress_is_not_judged(truth: Truth) -> None:
    truth.added(BAR)
    with truth.motion(ALL):
        assert rule(truth, pfn=1) is None


def test_a_mapping_from_before_an_unmap_is_left(truth: Truth) -> None:
    truth.added(BAR)
    with truth.motion(ALL):
        truth.unmapped(ALL)
    assert rule(truth, at=0) is Rule.LEFT


def test_a_mapping_made_after_an_unmap_is_late(truth: Truth) -> None:
    truth.added(BAR)
    with truth.motion(ALL):
        truth.unmapped(ALL)
    assert rule(truth, at=99) is Rule.LATE


@pytest.mark.parametrize(
    ("touched", "seen"),
    [
        pytest.param(103, Rule.EXTRAPOLATED, id="of a page that is there"),
        pytest.param(105, Rule.LATE, id="of the page itself"),
    ],
)
def test_f_a_mapping_for_an_intercept_sent_after_the_unmap_is_extrapolated(
    truth: Truth, touched: int, seen: Rule
) -> None:
    """Nothing was out of date: the one frame that was looked up is another page's."""
    truth.added(BAR)
    with truth.motion(Pages(4, 8)):
        truth.unmapped(Pages(4, 8))
    with truth.watching(touched, Access.READ) as watch:
        verdict = truth.wrong(Reached(105, PFN + 5, RW, mapped_at=99, mapped_for=watch))
    assert verdict is not None
    assert verdict[0] is seen


def test_e_a_mapping_for_an_intercept_in_flight_during_the_unmap_is_late(
    truth: Truth,
) -> None:
    truth.added(BAR)
    with truth.watching(103, Access.READ) as watch:
        with truth.motion(Pages(4, 8)):
            truth.unmapped(Pages(4, 8))
        verdict = truth.wrong(Reached(105, PFN + 5, RW, mapped_at=99, mapped_for=watch))
    assert verdict is not None
    assert verdict[0] is Rule.LATE


def test_a_mapping_that_survives_an_invalidation_is_left(truth: Truth) -> None:
    """The frame is the same, but the entry is not: it should have been revoked and mapped again."""
    truth.added(BAR)
    with truth.motion(ALL):
        pass
    assert (rule(truth, at=0), rule(truth, at=99)) == (Rule.LEFT, None)


def test_nothing_reaches_a_range_between_begin_and_end(truth: Truth) -> None:
    truth.added(BAR)
    truth.closed(Pages(4, 8))
    inside = rule(truth, at=99)
    truth.opened(Pages(4, 8))
    assert (inside, rule(truth, at=99)) == (Rule.LATE, None)


def test_equal_ranges_that_are_closed_twice_are_opened_twice(truth: Truth) -> None:
    truth.added(BAR)
    truth.closed(ALL)
    truth.closed(ALL)
    truth.opened(ALL)
    assert rule(truth, at=99) is Rule.LATE


def test_a_mapping_of_a_removed_region_was_left_or_came_late(truth: Truth) -> None:
    truth.added(BAR)
    truth.removed(BAR)
    assert (rule(truth, at=0), rule(truth, at=99)) == (Rule.LEFT_REGION, Rule.LATE_REGION)


def test_a_pinned_region_that_lost_memory_is_not_mapped_again(truth: Truth) -> None:
    truth.added(PINNED)
    with truth.motion(Pages(4, 6)):
        pass
    assert rule(truth, at=99) is Rule.DANGLING


def test_a_pinned_region_added_again_is_not_dangling(truth: Truth) -> None:
    truth.added(PINNED)
    with truth.motion(Pages(4, 6)):
        pass
    truth.removed(PINNED)
    truth.added(PINNED)
    assert rule(truth, at=99) is None


def test_a_pinned_region_added_again_after_a_failure_is_not_dangling(truth: Truth) -> None:
    with truth.doubt(PINNED), truth.motion(Pages(4, 6)):
        pass
    truth.added(PINNED)
    assert rule(truth, at=99) is None


# ------------------------------------------------ a change of regions


def reached(gfn: int, pfn: int, access: Access = RW) -> Reached:
    return Reached(gfn, pfn, access, 0, mapped_for=None)


@contextmanager
def refused_change(truth: Truth, old: Sequence[Bar], new: Sequence[Bar]) -> Iterator[None]:
    """It is refused at the end of the block."""
    with suppress(OSError), truth.change(old, new):
        yield
        raise OSError


@pytest.fixture
def changing(truth: Truth) -> Truth:
    """`BAR` is there, and so is the memory of the ROM that takes its place."""
    truth.mapped(ROM.pages, ROM_PFN, Access.READ)
    truth.added(BAR)
    return truth


@pytest.mark.parametrize("gfn", [105, 107])
def test_a_gfn_covered_before_and_after_a_change_is_covered_throughout(changing: Truth, gfn: int) -> None:
    with changing.change([BAR], [ROM]), changing.watching(gfn, Access.READ) as watch:
        assert watch.rightly == set()


@pytest.mark.parametrize(
    "bars", [([BAR], [MOVED]), ([], [MOVED]), ([ROM], [MOVED])], ids=["both ends of a move", "an add", "none"]
)
def test_a_gfn_covered_only_before_or_after_a_change_may_be_without_region(
    changing: Truth, bars: tuple[list[Bar], list[Bar]]
) -> None:
    with changing.change(*bars), changing.watching(205, Access.READ) as watch:
        assert watch.rightly == {Answer.NO_REGION}


def test_either_regions_may_be_reached_during_a_change_and_the_new_ones_after_it(changing: Truth) -> None:
    frames = (PFN + 5, ROM_PFN + 5)
    with changing.change([BAR], [ROM]):
        meanwhile = [rule(changing, pfn=pfn, access=Access.READ) for pfn in frames]
    afterwards = [rule(changing, pfn=pfn, access=Access.READ) for pfn in frames]
    assert (meanwhile, afterwards) == ([None, None], [Rule.WRONG_FRAME, None])


def test_the_old_regions_are_reached_after_a_change_that_was_refused(changing: Truth) -> None:
    with refused_change(changing, [BAR], [ROM]):
        pass
    found = [rule(changing, pfn=pfn, access=Access.READ) for pfn in (PFN + 5, ROM_PFN + 5)]
    assert found == [None, Rule.WRONG_FRAME]


def test_what_only_one_side_of_a_change_gives_is_not_reached_beside_what_the_other_does(
    changing: Truth,
) -> None:
    old, new = reached(105, PFN + 5), reached(106, ROM_PFN + 6, Access.READ)
    with changing.change([BAR], [ROM]):
        assert changing.mixed([old, new]) is not None
        assert changing.mixed([old, reached(106, PFN + 6)]) is None
    assert changing.mixed([old, new]) is None


def test_what_is_mapped_alike_before_and_after_a_change_stays(changing: Truth) -> None:
    short = replace(BAR, count=8)
    read_only = Bar("rest", 108, 8, 8, access=Access.READ)
    with changing.change([BAR], [short, read_only]):
        assert [changing.stays(gfn) for gfn in (107, 108)] == [True, False]
    assert not changing.stays(107)


def test_a_pinned_region_is_whole_until_its_memory_goes(truth: Truth) -> None:
    with truth.change([], [PINNED]):
        assert list(truth.pinned()) == []
    whole = list(truth.pinned())
    with truth.motion(Pages(4, 6)):
        pass
    assert (whole, list(truth.pinned())) == ([PINNED], [])


def test_what_is_left_of_a_dangling_region_is_mapped_again_by_a_refused_change_alone(truth: Truth) -> None:
    truth.added(PINNED)
    with truth.motion(Pages(4, 6)):
        pass
    with refused_change(truth, [PINNED], [ROM]):
        mapped_at = truth._now()
        meanwhile = rule(truth, gfn=108, pfn=PFN + 8, at=mapped_at)
    assert (meanwhile, rule(truth, gfn=108, pfn=PFN + 8, at=mapped_at)) == (None, None)
    assert rule(truth, gfn=108, pfn=PFN + 8, at=99) is Rule.DANGLING


def test_of_a_pinned_region_that_was_hit_while_it_was_added_it_is_not_known_whether_it_dangles(
    truth: Truth,
) -> None:
    with truth.change([], [PINNED]):
        with truth.motion(Pages(4, 6)):
            truth.protected(Pages(4, 6), Access.READ)
        assert rule(truth, gfn=108, pfn=PFN + 8, at=99) is None
    with truth.watching(105, Access.WRITE) as watch:
        assert watch.rightly == {Answer.UNBACKED, Answer.PERMISSION}
    assert list(truth.pinned()) == []


def test_a_pinned_region_that_replaces_a_dangling_one_is_whole(truth: Truth) -> None:
    truth.added(PINNED)
    with truth.motion(Pages(4, 6)):
        pass
    with truth.change([PINNED], [PINNED]):
        pass
    assert list(truth.pinned()) == [PINNED]


# ------------------------------------------------ rights and reasons


def test_removed_rights_are_not_kept(truth: Truth) -> None:
    truth.added(BAR)
    with truth.motion(ALL):
        truth.protected(ALL, Access.READ)
    assert (rule(truth, at=0), rule(truth, at=99)) == (Rule.LEFT, Rule.LATE)


@pytest.mark.parametrize(
    ("gfn", "access", "rightly"),
    [
        (50, Access.READ, {Answer.NO_REGION}),
        (105, Access.READ, set()),
        (105, Access.EXECUTE, {Answer.PERMISSION}),
        (118, Access.READ, {Answer.UNBACKED}),
    ],
)
def test_a_forward_is_right_only_for_its_reason(
    truth: Truth, gfn: int, access: Access, rightly: set[Answer]
) -> None:
    truth.added(Bar("long", 100, 20, 0))
    with truth.watching(gfn, access) as watch:
        assert watch.rightly == rightly


def test_a_forward_that_was_right_at_some_instant_of_the_intercept_is_right(truth: Truth) -> None:
    truth.added(BAR)
    with truth.watching(105, Access.READ) as watch:
        with truth.motion(ALL):
            truth.unmapped(ALL)
        truth.mapped(ALL, 2000, RW)
        assert watch.rightly == {Answer.UNBACKED}
