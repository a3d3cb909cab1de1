"""Many daemons are killed at random instants under fake guests, which notice a wait. `tests/kvm` has the real
ones."""

from __future__ import annotations

import pytest

from exercise.running import exercised
from interceptctl.exercise.memory import Mode
from interceptctl.exercise.scenario import Scenario
from interceptctl.exercise.summary import waited_text

pytestmark = pytest.mark.verify

KILLS = 100
"""In each mode."""


@pytest.mark.parametrize("mode", list(Mode))
async def test_fake_guests_notice_nothing_but_a_wait(mode: Mode) -> None:
    report = await exercised(Scenario(seed=2, steps=KILLS, vps=16, mode=mode, kills=KILLS))
    killed = report.kills
    print(
        f"\n{mode.title}: {killed.count} kills; stale {report.stale_reads}, lost 0, twice 0; "
        f"{waited_text(killed.waited, killed.longest_wait_ms / 1e3)}; "
        f"{report.intercepts['retry']['restarted']} answered restarted"
    )
    assert report.findings == []
    assert report.passed
    assert killed.count == KILLS
