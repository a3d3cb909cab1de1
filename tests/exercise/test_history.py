"""The rule of uncertainty: both values are possible from request to acknowledgement."""

from __future__ import annotations

import pytest

from interceptctl.exercise.clock import Clock, During
from interceptctl.exercise.history import History


def changed(*, asked: int, acknowledged: int, horizon: int = 0) -> History[str]:
    history = History("old")
    history.ask("new", asked)
    history.acknowledge(acknowledged, horizon)
    return history


def possible(history: History[str], first: int, last: int) -> set[str]:
    return {value for value, _ in history.possible(During(first, last))}


@pytest.mark.parametrize(
    ("first", "last", "expected"),
    [
        (1, 9, {"old"}),
        (8, 12, {"old", "new"}),
        (12, 18, {"old", "new"}),
        (18, 25, {"old", "new"}),
        (21, 30, {"new"}),
    ],
)
def test_both_values_are_possible_between_request_and_acknowledgement(
    first: int, last: int, expected: set[str]
) -> None:
    assert possible(changed(asked=10, acknowledged=20), first, last) == expected


def test_an_unanswered_change_leaves_both_values_possible() -> None:
    history = History("old")
    history.ask("new", 10)
    assert possible(history, 50, 60) == {"old", "new"}


def test_a_refused_change_was_possible_until_it_was_refused() -> None:
    history = History("old")
    history.ask("new", 10)
    history.refuse(20, horizon=0)
    assert possible(history, 15, 25) == {"old", "new"}
    assert possible(history, 21, 25) == {"old"}
    assert history.now == "old"


def test_values_that_ended_before_the_horizon_are_dropped() -> None:
    history = changed(asked=10, acknowledged=20, horizon=21)
    assert possible(history, 1, 30) == {"new"}


def test_values_that_ended_after_the_horizon_are_kept() -> None:
    history = changed(asked=10, acknowledged=20, horizon=20)
    assert possible(history, 1, 30) == {"old", "new"}


def test_the_horizon_is_the_oldest_open_question() -> None:
    clock = Clock()
    with clock.question() as oldest:
        with clock.question():
            clock.tick()
        assert clock.horizon == oldest
    assert clock.horizon > oldest
