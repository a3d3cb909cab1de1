"""The invariants as properties of a whole partition under drawn schedules, by the numbers of ARCHITECTURE.md.

The explorer judges every step of random schedules (`explorer`); each test checks the rules of one
invariant. I7 and I8 have separate tests.
"""

from __future__ import annotations

import pytest

from explorer.rules import Rule
from explorer.scenarios import SCENARIOS
from explorer.search import Explorer, Failure, exploring
from explorer.variants import CORE

SCHEDULES = 150
FROM = 5000
"""Beyond the schedule numbers of other tests."""


@pytest.fixture(scope="module")
def broken() -> dict[Rule, Failure]:
    """The rules that random schedules broke."""

    async def search(explorer: Explorer) -> dict[Rule, Failure]:
        return await explorer.first_of_each(SCENARIOS["random"], FROM, SCHEDULES)

    return exploring(CORE.build, search)


def of(invariant: str, broken: dict[Rule, Failure]) -> list[Failure]:
    return [failure for rule, failure in broken.items() if rule.invariant == invariant]


def test_i1_after_an_acknowledgement_no_entry_made_from_the_old_frames_exists(
    broken: dict[Rule, Failure],
) -> None:
    assert of("I1", broken) == []


def test_i2_every_entry_lies_in_a_region_at_the_frame_of_its_uaddr(broken: dict[Rule, Failure]) -> None:
    assert of("I2", broken) == []


def test_i3_regions_are_sorted_disjoint_and_do_not_wrap(broken: dict[Rule, Failure]) -> None:
    assert of("I3", broken) == []


def test_i4_every_fault_is_answered_in_bounded_time_and_forwarded_only_when_that_was_true(
    broken: dict[Rule, Failure],
) -> None:
    assert of("I4", broken) == []


def test_i5_the_lock_is_never_held_across_resolve(broken: dict[Rule, Failure]) -> None:
    assert of("I5", broken) == []


def test_i6_after_the_end_the_slat_is_empty_and_no_task_is_left(
    broken: dict[Rule, Failure],
) -> None:
    assert of("I6", broken) == []


def test_i9_no_vp_maps_a_mapped_page_or_undoes_the_map_of_another(broken: dict[Rule, Failure]) -> None:
    assert of("I9", broken) == []


def test_i10_record_and_slat_agree_at_every_step_despite_cancellation(broken: dict[Rule, Failure]) -> None:
    assert of("I10", broken) == []


def test_i11_what_is_logged_adds_up_to_what_is_and_a_successor_goes_on_rightly(
    broken: dict[Rule, Failure],
) -> None:
    assert of("I11", broken) == []


def test_no_other_rule_is_broken(broken: dict[Rule, Failure]) -> None:
    assert broken == {}
