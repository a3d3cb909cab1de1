"""A short exercise of the real daemon, and of mutants. `tests/verify` has the long ones."""

from __future__ import annotations

import pytest

from exercise.running import WITHOUT_INVALIDATION, WITHOUT_STALENESS_CHECK, exercised
from interceptctl.exercise.memory import Mode
from interceptctl.exercise.scenario import Scenario


@pytest.mark.parametrize("mode", list(Mode))
async def test_the_real_daemon_passes_while_its_ports_yield(mode: Mode) -> None:
    report = await exercised(Scenario(steps=300, mode=mode), chaos=3)
    assert report.findings == []
    assert report.passed


async def test_an_exercise_reaches_every_outcome_except_fail() -> None:
    report = await exercised(Scenario(steps=300, mode=Mode.DECLARED))
    reached = {outcome for outcome, reasons in report.intercepts.items() if any(reasons.values())}
    assert reached == {"resume", "forward", "retry"}
    assert report.steps >= 300
    assert report.invalidations > 100


@pytest.mark.parametrize("mode", list(Mode))
async def test_a_daemon_that_is_killed_costs_its_guests_a_wait_and_nothing_else(mode: Mode) -> None:
    report = await exercised(Scenario(steps=200, mode=mode, kills=1))
    assert report.findings == []
    assert report.passed
    assert report.kills.count == 1
    assert report.kills.waited > 0
    assert report.kills.longest_wait_ms > 0


@pytest.mark.parametrize("mode", list(Mode))
async def test_k_a_mutant_that_revokes_nothing_is_detected(mode: Mode) -> None:
    report = await exercised(Scenario(steps=100, mode=mode), WITHOUT_INVALIDATION)
    assert report.stale_reads > 0
    assert not report.passed


async def test_e_a_mutant_without_staleness_check_is_detected() -> None:
    scenario = Scenario(steps=800, vps=16, mode=Mode.DECLARED)
    report = await exercised(scenario, WITHOUT_STALENESS_CHECK, chaos=20)
    assert report.stale_reads > 0
