"""A short exercise of a real daemon, and of daemons that lack something. `tests/verify` has the long ones."""

from __future__ import annotations

import pytest

from exercise.running import WITHOUT_INVALIDATION, WITHOUT_STALENESS_CHECK, exercised
from interceptctl.exercise.memory import Setting
from interceptctl.exercise.scenario import Scenario


@pytest.mark.parametrize("setting", list(Setting))
async def test_no_guest_reaches_what_it_should_not_while_ports_yield(setting: Setting) -> None:
    report = await exercised(Scenario(steps=300, setting=setting), chaos=3)
    assert report.findings == []
    assert report.passed


async def test_an_exercise_reaches_every_outcome_but_failure() -> None:
    report = await exercised(Scenario(steps=300, setting=Setting.DECLARED))
    reached = {outcome for outcome, reasons in report.intercepts.items() if any(reasons.values())}
    assert reached == {"resume", "forward", "retry"}
    assert report.steps >= 300
    assert report.invalidations > 100


@pytest.mark.parametrize("setting", list(Setting))
async def test_k_a_daemon_that_takes_nothing_away_is_found_out(setting: Setting) -> None:
    report = await exercised(Scenario(steps=100, setting=setting), WITHOUT_INVALIDATION)
    assert report.stale_reads > 0
    assert not report.passed


async def test_e_a_daemon_that_never_checks_for_staleness_is_found_out() -> None:
    scenario = Scenario(steps=800, vps=16, setting=Setting.DECLARED)
    report = await exercised(scenario, WITHOUT_STALENESS_CHECK, chaos=20)
    assert report.stale_reads > 0
