"""A line that may come again and again is written once a minute, and says how many were not."""

from __future__ import annotations

from interceptd.log_pace import SECONDS, LogPace


def test_of_each_kind_one_line_passes_in_a_minute_and_the_next_counts_the_others() -> None:
    now = [0.0]
    pace = LogPace(lambda: now[0])
    assert [pace.passed_over("a") for _ in range(3)] == [0, None, None]
    assert pace.passed_over("b") == 0
    now[0] = SECONDS
    assert [pace.passed_over("a"), pace.passed_over("b")] == [2, 0]


def test_it_is_idle_once_every_kind_may_be_written_again() -> None:
    now = [0.0]
    pace = LogPace(lambda: now[0])
    assert pace.idle
    pace.passed_over("a")
    now[0] = SECONDS / 2
    pace.passed_over("b")
    now[0] = SECONDS
    assert not pace.idle
    now[0] = SECONDS * 1.5
    assert pace.idle
