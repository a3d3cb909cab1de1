"""The long exploration: the daemon's core through 100,000 schedules of all scenarios."""

from __future__ import annotations

import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest

from interceptctl.explore.report import Explored, explored
from interceptctl.explore.scenarios import SCENARIOS
from interceptctl.explore.variants import OURS

pytestmark = pytest.mark.verify

SCHEDULES = 100_000
EACH = -(-SCHEDULES // len(SCENARIOS))


def test_the_core_breaks_no_rule_in_100_000_schedules(capsys: pytest.CaptureFixture[str]) -> None:
    started = time.monotonic()
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as processes:
        reports = list(processes.map(explore, SCENARIOS))
    schedules = sum(report.schedules for report in reports)
    with capsys.disabled():
        print(f"\n{schedules:,} schedules in {time.monotonic() - started:.0f} s")
    assert [example for report in reports for example in report.counterexamples] == []
    assert schedules >= SCHEDULES


def explore(scenario: str) -> Explored:
    return explored(OURS, [SCENARIOS[scenario]], seed=0, schedules=EACH, watching=lambda _: None)
