"""The reference accepts exactly what can have been true."""

from __future__ import annotations

from exercise.worlds import GFN, PAGE, READ, READ_WRITE, UADDRS, WRITE, Scene, backing, region
from intercept_protocol.addresses import UaddrRange
from intercept_protocol.messages import RegionKind
from intercept_protocol.outcomes import Answer
from interceptctl.exercise.clock import During
from interceptctl.exercise.history import FOREVER
from interceptctl.exercise.world import RESUMED, Frame, Sight


def test_an_old_frame_is_possible_while_its_unmap_is_under_way_and_never_after() -> None:
    scene = Scene()
    scene.add(region())
    scene.map(backing(0x50))
    old = Sight(Frame("host", 0x50), READ_WRITE)
    with scene.clock.question() as asked:
        edit = scene.truth.ask_unmap(UADDRS, scene.clock.tick())
        assert scene.truth.possible_sights(GFN, During(asked, scene.clock.tick())) == {old}
        edit.acknowledge(scene.clock.tick())
        assert scene.truth.possible_sights(GFN, During(asked, scene.clock.tick())) == {old}
        assert scene.truth.possible_sights(GFN, scene.now()) == set()


def test_a_replaced_page_leads_to_the_new_frame_alone() -> None:
    scene = Scene()
    scene.add(region())
    scene.map(backing(0x50))
    scene.unmap()
    scene.map(backing(0x90))
    assert scene.truth.possible_sights(GFN + 2, scene.now()) == {Sight(Frame("host", 0x92), READ_WRITE)}


def test_a_question_over_a_whole_replacement_may_have_found_anything_in_between() -> None:
    scene = Scene()
    scene.add(region())
    scene.map(backing(0x50))
    with scene.clock.question() as asked:
        scene.unmap()
        scene.map(backing(0x90, READ))
        during = During(asked, scene.clock.tick())
        assert scene.truth.possible_answers(GFN, WRITE, during) == RESUMED | {
            Answer.UNBACKED,
            Answer.PERMISSION,
        }


def test_region_and_backing_that_never_coexisted_allow_nothing() -> None:
    scene = Scene()
    first = scene.add(region())
    with scene.clock.question() as asked:
        scene.remove(first)
        scene.map(backing(0x50))
        during = During(asked, scene.clock.tick())
        assert scene.truth.possible_answers(GFN, READ, during) == {Answer.UNBACKED, Answer.NO_REGION}
        assert scene.truth.possible_sights(GFN, during) == set()


def test_old_rights_are_impossible_after_protect() -> None:
    scene = Scene()
    scene.add(region())
    scene.map(backing(0x50))
    scene.protect(READ)
    assert scene.truth.possible_sights(GFN, scene.now()) == {Sight(Frame("host", 0x50), READ)}
    assert scene.truth.possible_answers(GFN, WRITE, scene.now()) == {Answer.PERMISSION}


def test_nothing_is_reached_or_resumed_between_begin_and_end() -> None:
    scene = Scene()
    scene.add(region())
    scene.map(backing(0x50))
    invalidation = scene.truth.ask_invalidation(UADDRS, scene.clock.tick())
    before = scene.now()
    invalidation.gone, invalidation.shut_until = scene.clock.tick(), FOREVER
    within = scene.now()
    invalidation.shut_until = scene.clock.tick()
    assert scene.truth.possible_answers(GFN, READ, before) == RESUMED
    assert scene.truth.possible_answers(GFN, READ, within) == frozenset()
    assert scene.truth.possible_sights(GFN, within) == set()
    assert scene.truth.possible_answers(GFN, READ, scene.now()) == RESUMED


def test_two_invalidations_leave_an_instant_between_them() -> None:
    scene = Scene()
    scene.add(region())
    scene.map(backing(0x50))
    first = scene.truth.ask_invalidation(UADDRS, scene.clock.tick())
    second = scene.truth.ask_invalidation(UADDRS, scene.clock.tick())
    first.gone = scene.clock.tick()
    asked = scene.clock.tick()
    first.shut_until = scene.clock.tick()
    second.gone, second.shut_until = scene.clock.tick(), FOREVER
    assert scene.truth.possible_answers(GFN, READ, During(asked, scene.clock.tick())) == RESUMED


def test_overlapping_invalidations_leave_none() -> None:
    scene = Scene()
    scene.add(region())
    scene.map(backing(0x50))
    first = scene.truth.ask_invalidation(UADDRS, scene.clock.tick())
    second = scene.truth.ask_invalidation(UADDRS, scene.clock.tick())
    first.gone = scene.clock.tick()
    asked = scene.clock.tick()
    second.gone, second.shut_until = scene.clock.tick(), FOREVER
    first.shut_until = scene.clock.tick()
    assert scene.truth.possible_answers(GFN, READ, During(asked, scene.clock.tick())) == frozenset()


def test_an_open_invalidation_is_remembered_however_long_it_lasts() -> None:
    scene = Scene()
    scene.add(region())
    scene.map(backing(0x50))
    open_one = scene.truth.ask_invalidation(UADDRS, scene.clock.tick())
    open_one.gone, open_one.shut_until = scene.clock.tick(), FOREVER
    scene.unmap(UaddrRange(start=PAGE + 1, end=PAGE + 2))
    scene.unmap(UaddrRange(start=PAGE + 2, end=PAGE + 3))
    assert scene.truth.possible_answers(GFN, READ, scene.now()) == frozenset()


def test_aliases_show_the_same_frames() -> None:
    scene = Scene()
    scene.add(region())
    alias = scene.add(region())
    scene.map(backing(0x50))
    assert alias.gfns_of(UaddrRange(start=PAGE + 1, end=PAGE + 9)) == region().gfns.slice(GFN + 1, GFN + 4)


def test_a_refused_region_was_never_there_for_good() -> None:
    scene = Scene()
    edit = scene.truth.ask_add(region(RegionKind.PINNED), scene.clock.tick())
    edit.refuse(scene.clock.tick())
    assert scene.truth.regions == []
    assert scene.truth.possible_answers(GFN, READ, scene.now()) == {Answer.NO_REGION}


def test_a_pinned_page_that_was_hit_is_never_mapped_again() -> None:
    scene = Scene()
    scene.map(backing(0x50))
    scene.add(region(RegionKind.PINNED))
    hit = UaddrRange(start=PAGE, end=PAGE + 1)
    scene.unmap(hit)
    scene.map(backing(0x90), hit)
    assert scene.truth.possible_answers(GFN, READ, scene.now()) == {Answer.UNBACKED}
    assert scene.truth.possible_sights(GFN, scene.now()) == set()
    assert scene.truth.possible_answers(GFN + 1, READ, scene.now()) == RESUMED | {Answer.UNBACKED}


def test_a_pinned_page_is_there_until_the_hit_is_acknowledged() -> None:
    scene = Scene()
    scene.map(backing(0x50))
    scene.add(region(RegionKind.PINNED))
    scene.truth.ask_invalidation(UADDRS, scene.clock.tick())
    assert scene.truth.possible_answers(GFN, READ, scene.now()) == RESUMED | {Answer.UNBACKED}
    assert scene.truth.possible_sights(GFN, scene.now()) == {Sight(Frame("host", 0x50), READ_WRITE)}


def test_a_mapping_is_touched_only_by_changes_that_revoke_it() -> None:
    scene = Scene()
    added = scene.add(region())
    scene.map(backing(0x50))
    quiet = scene.now()
    with scene.clock.question() as asked:
        scene.truth.ask_invalidation(
            UaddrRange(start=PAGE, end=PAGE + 1), scene.clock.tick()
        ).gone = scene.clock.tick()
        disturbed = During(asked, scene.clock.tick())
        assert not scene.truth.touched(GFN, quiet)
        assert scene.truth.touched(GFN, disturbed)
        assert not scene.truth.touched(GFN + 1, disturbed)
        scene.remove(added)
        assert scene.truth.touched(GFN + 1, During(asked, scene.clock.tick()))


def test_gaps_are_the_runs_without_backing() -> None:
    scene = Scene()
    scene.map(backing(0x50), UaddrRange(start=PAGE + 1, end=PAGE + 2))
    assert scene.truth.gaps(UADDRS) == [
        UaddrRange(start=PAGE, end=PAGE + 1),
        UaddrRange(start=PAGE + 2, end=PAGE + 4),
    ]
