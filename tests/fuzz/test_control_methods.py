"""A real daemon answers every sequence of control requests as the plain partition does."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis.stateful import run_state_machine_as_test

from fakes.daemon_process import DaemonProcess
from fakes.puppet import ENVIRONMENT
from fuzz.control_methods import ControlMethods

DRAWN = 4
"""A seed whose sessions find the mutants soon."""


@pytest.mark.parametrize(
    ("sessions", "steps"), [(25, 40), pytest.param(400, 80, marks=pytest.mark.verify)], ids=["short", "long"]
)
def test_daemon_answers_a_drawn_session_as_the_plain_partition_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sessions: int, steps: int
) -> None:
    drawn = settings(
        max_examples=sessions,
        stateful_step_count=steps,
        suppress_health_check=list(HealthCheck),
    )
    with DaemonProcess(tmp_path) as daemon:
        monkeypatch.setattr(ControlMethods, "socket", str(daemon.wait_serving().socket), raising=False)
        run_state_machine_as_test(ControlMethods, settings=drawn)


@pytest.mark.parametrize("mutant", ["without-invalidation", "with-hard-coded-rights"])
def test_a_mutant_daemon_answers_differently_from_the_plain_partition(tmp_path: Path, mutant: str) -> None:
    drawn = settings(
        max_examples=100,
        stateful_step_count=40,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    launch = (sys.executable, "-m", "fakes.mutant_daemon", mutant)
    with DaemonProcess(tmp_path, launch=launch, environment=ENVIRONMENT) as daemon:
        socket = str(daemon.wait_serving().socket)
        machine = seed(DRAWN)(type("DrawnMethods", (ControlMethods,), {"socket": socket}))
        with pytest.raises(AssertionError):
            run_state_machine_as_test(machine, settings=drawn)
