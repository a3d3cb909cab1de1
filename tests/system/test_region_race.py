"""Regions that change under VPs that fault on them, in declared memory.

Each access meets what was there before the change or what is there after it, never neither. Without the one
step, or with the old memory left mapped, the same race finds it.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import trio

from fakes.daemon_process import DaemonProcess
from fakes.puppet import ENVIRONMENT
from fakes.region_race import VPS, race_in_declared_memory
from fakes.region_toggles import MOVES, OTHERS, Findings, How, Kind


def raced(daemon: DaemonProcess, kinds: Sequence[Kind], changes: int, how: How = How.IN_ONE_STEP) -> Findings:
    return trio.run(race_in_declared_memory, daemon.socket, kinds, changes, how)


@pytest.mark.parametrize(
    ("kinds", "changes"),
    [(MOVES, 1000), (OTHERS, 100), pytest.param(MOVES, 10_000, marks=pytest.mark.verify)],
    ids=["ROM shadow and BAR", "other changes", "ROM shadow and BAR for long"],
)
def test_every_access_meets_the_old_regions_or_the_new_ones(
    daemon: DaemonProcess, kinds: Sequence[Kind], changes: int
) -> None:
    found = raced(daemon, kinds, changes)
    assert (found.changes, found.wrong, found.examples) == (changes, 0, [])
    assert found.accesses >= VPS * changes
    assert found.during_a_change > changes
    assert found.pages_reached > 0


def test_the_same_race_by_removing_and_adding_finds_gaps(daemon: DaemonProcess) -> None:
    assert raced(daemon, MOVES, 25, How.IN_TWO_STEPS).gaps > 0


@pytest.mark.parametrize(
    ("mutant", "has_gaps"), [("changing-in-two-steps", True), ("without-taking-away", False)]
)
def test_a_mutant_daemon_is_found_out(tmp_path: Path, mutant: str, has_gaps: bool) -> None:
    launch = (sys.executable, "-m", "fakes.mutant_daemon", mutant)
    with DaemonProcess(tmp_path, launch=launch, environment=ENVIRONMENT) as daemon:
        found = raced(daemon.wait_serving(), MOVES, 25)
    assert found.wrong > 0
    assert (found.gaps > 0) is has_gaps
