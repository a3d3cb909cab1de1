"""Regions that change under VPs that fault on them, in the memory of a VMM's process.

Each access meets what was there before the change or what is there after it, never neither. Without the one
step, the same race finds accesses that met neither.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from fakes.daemon_process import DaemonProcess
from fakes.puppet import ENVIRONMENT, StartVmm
from fakes.region_race import VPS, race_in_own_memory
from fakes.region_toggles import MOVES, OTHERS, Findings, How, Kind

PATIENCE_A_CHANGE = 0.2
"""Seconds, beyond which a race counts as hanging."""


CHAOS = {"INTERCEPTD_CHAOS": "5"}
"""Extra steps, so that an attempt lasts."""


def raced(
    daemon: DaemonProcess,
    start_vmm: StartVmm,
    kinds: Sequence[Kind],
    changes: int,
    how: How = How.IN_ONE_STEP,
) -> Findings:
    race = start_vmm().start(race_in_own_memory, daemon.socket, kinds, changes, how)
    return race.result(60 + PATIENCE_A_CHANGE * changes)


@pytest.mark.parametrize(
    ("kinds", "changes"),
    [(MOVES, 1000), (OTHERS, 100), pytest.param(MOVES, 10_000, marks=pytest.mark.verify)],
    ids=["ROM shadow and BAR", "other changes", "ROM shadow and BAR for long"],
)
def test_every_access_meets_the_old_regions_or_the_new_ones(
    daemon: DaemonProcess, start_vmm: StartVmm, kinds: Sequence[Kind], changes: int
) -> None:
    found = raced(daemon, start_vmm, kinds, changes)
    assert (found.changes, found.wrong, found.examples) == (changes, 0, [])
    assert found.accesses >= VPS * changes
    assert found.during_a_change > changes
    assert found.pages_reached > 0


@pytest.mark.verify  # most first touches need no attempt, so it takes many
def test_a_mutant_daemon_that_maps_for_removed_regions_is_found_out(
    tmp_path: Path, start_vmm: StartVmm
) -> None:
    launch = (sys.executable, "-m", "fakes.mutant_daemon", "without-forgetting-attempts")
    with DaemonProcess(tmp_path, launch=launch, environment=ENVIRONMENT | CHAOS) as daemon:
        assert raced(daemon.wait_serving(), start_vmm, MOVES, 2000).wrong > 0


def test_the_same_race_by_removing_and_adding_finds_gaps(daemon: DaemonProcess, start_vmm: StartVmm) -> None:
    assert raced(daemon, start_vmm, MOVES, 25, How.IN_TWO_STEPS).gaps > 0
