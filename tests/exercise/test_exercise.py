"""A short exercise of a real daemon, and of daemons that lack something. `tests/verify` has the long ones."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from fakes import broken_daemon
from interceptctl.exercise.daemon_process import REAL_DAEMON, running_daemon
from interceptctl.exercise.exercise import exercise
from interceptctl.exercise.live import watch_nothing
from interceptctl.exercise.report import Report
from interceptctl.exercise.scenario import Scenario
from interceptctl.exercise.tally import Wrong

CHAOS = "INTERCEPTD_CHAOS"


def lacking(what: str) -> tuple[str, ...]:
    """The command of a daemon that lacks something."""
    return sys.executable, str(Path(broken_daemon.__file__)), what


async def exercised(command: tuple[str, ...], scenario: Scenario) -> Report:
    async with running_daemon(command) as path:
        return await exercise(path, scenario, watch_nothing)


async def test_no_guest_reaches_what_it_should_not_while_ports_yield(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CHAOS, "3")
    report = await exercised(REAL_DAEMON, Scenario(steps=300))
    assert report.findings == []
    assert report.passed


async def test_an_exercise_reaches_every_outcome_but_failure() -> None:
    report = await exercised(REAL_DAEMON, Scenario(steps=300))
    reached = {outcome for outcome, reasons in report.intercepts.items() if any(reasons.values())}
    assert reached == {"resume", "forward", "retry"}
    assert report.steps >= 300
    assert report.invalidations > 100


async def test_k_a_daemon_that_takes_nothing_away_is_found_out() -> None:
    report = await exercised(lacking("without-invalidation"), Scenario(steps=100))
    assert report.wrongs[Wrong.UNTRUE_SIGHT] > 0
    assert report.stale_reads > 0


async def test_e_a_daemon_that_never_checks_for_staleness_is_found_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(CHAOS, "3")
    report = await exercised(lacking("without-staleness-check"), Scenario(steps=600))
    assert report.stale_reads > 0
