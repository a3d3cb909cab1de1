"""Many daemons are killed at random instants under fake guests, which notice a wait. `tests/kvm` has the real
ones."""

from __future__ import annotations

from pathlib import Path

import pytest

from exercise.running import exercised
from fakes.kept_daemon import KeptDaemon
from intercept_protocol.errors import WireError
from interceptctl.exercise.exercise import exercise
from interceptctl.exercise.live import watch_nothing
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


async def test_daemons_that_forget_what_their_predecessor_had_begun_are_detected(tmp_path: Path) -> None:
    with KeptDaemon(tmp_path, mutant="forgetting begins") as kept:
        path, scenario = (
            str(kept.wait_serving().socket),
            Scenario(seed=3, steps=KILLS, mode=Mode.DECLARED, kills=KILLS),
        )
        with pytest.raises(ExceptionGroup) as caught:
            await exercise(path, scenario, watch_nothing, kept.kill)
    assert caught.group_contains(WireError, match="no begin of just")
