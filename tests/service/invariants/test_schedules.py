"""The invariants as properties of a whole partition under drawn schedules.

Each runs the same actors against each other and looks for its own kind of violation; world, inspection and
schedule in the fakes say how. The numbers are those of ARCHITECTURE.md.
"""

from __future__ import annotations

from hypothesis import HealthCheck, given, settings

from fakes.schedule import Schedule, schedules, violations_of

drawn = settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def broken(schedule: Schedule, invariant: str) -> list[str]:
    return [found.how for found in violations_of(schedule) if found.invariant == invariant]


@given(schedules())
@drawn
def test_i1_after_an_acknowledgement_no_entry_made_from_the_old_frames_exists(schedule: Schedule) -> None:
    assert broken(schedule, "I1") == []


@given(schedules())
@drawn
def test_i2_every_entry_lies_in_a_region_at_the_frame_of_its_uaddr(schedule: Schedule) -> None:
    assert broken(schedule, "I2") == []


@given(schedules())
@drawn
def test_i3_regions_are_sorted_disjoint_and_do_not_wrap(schedule: Schedule) -> None:
    assert broken(schedule, "I3") == []


@given(schedules())
@drawn
def test_i4_every_fault_is_answered_in_bounded_time_and_forwarded_only_when_that_was_true(
    schedule: Schedule,
) -> None:
    assert broken(schedule, "I4") == []


@given(schedules())
@drawn
def test_i5_the_lock_is_never_held_across_resolve(schedule: Schedule) -> None:
    assert broken(schedule, "I5") == []


@given(schedules())
@drawn
def test_i6_after_the_end_the_slat_is_empty_and_nobody_is_in_the_middle_of_anything(
    schedule: Schedule,
) -> None:
    assert broken(schedule, "I6") == []


@given(schedules())
@drawn
def test_i9_a_refusal_is_told_only_where_there_was_one(schedule: Schedule) -> None:
    assert broken(schedule, "I9") == []


@given(schedules())
@drawn
def test_i10_record_and_slat_agree_at_every_checkpoint_whoever_is_cancelled(schedule: Schedule) -> None:
    assert broken(schedule, "I10") == []
