"""The long exercise: 64 VPs against a VMM that changes its memory 100,000 times."""

from __future__ import annotations

import pytest

from exercise.running import WITHOUT_INVALIDATION, WITHOUT_STALENESS_CHECK, exercised
from interceptctl.exercise.memory import Mode
from interceptctl.exercise.scenario import Scenario

pytestmark = pytest.mark.verify

LONG = Scenario(seed=1, vps=64, steps=100_000, touches_per_action=2, mode=Mode.DECLARED)
LIVE = Scenario(seed=1, vps=64, steps=10_000, touches_per_action=2, mode=Mode.LIVE)
SHORTER = Scenario(seed=1, vps=64, steps=5_000, touches_per_action=2, mode=Mode.DECLARED)
"""For mutants, which are detected many times long before its end."""


@pytest.mark.parametrize("chaos", [0, 3])
async def test_the_real_daemon_passes(chaos: int) -> None:
    report = await exercised(LONG, chaos=chaos)
    assert report.findings == []
    assert report.passed
    assert report.steps >= 100_000
    assert report.stale_reads == 0


async def test_the_real_daemon_passes_with_live_memory() -> None:
    report = await exercised(LIVE)
    assert report.findings == []
    assert report.passed
    assert report.steps >= 10_000


async def test_k_a_mutant_without_invalidation_has_stale_reads() -> None:
    report = await exercised(SHORTER, WITHOUT_INVALIDATION)
    assert report.stale_reads > 1_000


async def test_e_a_mutant_without_staleness_check_has_stale_reads() -> None:
    report = await exercised(SHORTER, WITHOUT_STALENESS_CHECK, chaos=20)
    assert report.stale_reads > 10
