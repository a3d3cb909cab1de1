"""Daemons that are killed: at each step that matters most, their VMMs notice nothing but a wait.

The whole matrix of steps, and pairs of them, is in `tests/verify/test_kills.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from fakes import kill_scenarios
from fakes.kept_daemon import KeptDaemon
from fakes.kill_deeds import (
    Deed,
    adds,
    announces,
    changes,
    changes_in_vain,
    comes_and_goes,
    joins_a_vp,
    killed,
    leaves,
    touches,
    unmaps,
    works_for_long,
)
from fakes.kill_scenarios import Scenario
from fakes.surviving_vmm import Mode, SurvivingVmm

STEPS: Sequence[tuple[Mode, Sequence[tuple[Deed, str, int]]]] = [
    (Mode.DECLARED, [
        (joins_a_vp, "joined", 1),
        (adds, "read", 1),
        (announces, "sent", 1),
        (works_for_long, "committed", 1),
    ]),
    (Mode.WATCHED_VMM, [
        (comes_and_goes, "memory to be stored", 1),
        (comes_and_goes, "memory stored", 1),
        (touches, "asked", 1),
        (unmaps, "gone", 1),
        (changes, "edited", 3),
        (changes_in_vain, "to be put back", 1),
        (leaves, "unmapped all", 1),
    ]),
]  # fmt: skip


@pytest.mark.parametrize(("mode", "steps"), STEPS, ids=[mode.name for mode, _ in STEPS])
def test_a_kill_at_a_step_costs_a_wait(
    tmp_path: Path, mode: Mode, steps: Sequence[tuple[Deed, str, int]]
) -> None:
    """One daemon after the other, under the same VMM."""
    with KeptDaemon(tmp_path) as kept:
        with SurvivingVmm(kept.wait_serving().socket, mode) as vmm:
            for deed, point, call in steps:
                assert killed(kept, vmm, deed, (point, call)), (deed.__name__, point)
            assert vmm.vmm.statistics().restarts == kept.deaths == len(steps)
        assert kept.stop() == 0


@pytest.mark.parametrize(
    ("scenario", "troubles"),
    [
        (kill_scenarios.a_request_that_kills_daemons_ends_its_partition_alone, set()),
        (kill_scenarios.peers_leave_while_it_is_down, set()),
        (kill_scenarios.requests_that_came_meanwhile_are_answered, set()),
        (kill_scenarios.its_keeper_dies, {"descriptors_not_stored", "partition_not_kept"}),
        (kill_scenarios.limits_are_lower_for_the_successor, set()),
    ],
    ids=lambda scenario: getattr(scenario, "__name__", ""),
)
def test_it_survives_when(tmp_path: Path, scenario: Scenario, troubles: set[str]) -> None:
    with KeptDaemon(tmp_path) as kept:
        scenario(kept.wait_serving())
        assert kept.troubles() == troubles


def test_without_a_successor_all_ends_in_time(tmp_path: Path) -> None:
    with KeptDaemon(tmp_path, patience=0.2) as kept:
        kill_scenarios.no_successor_can_start(kept.wait_serving())
        assert kept.troubles() == {"descriptors_let_go"}


def test_a_daemon_without_doubt_leaves_what_is_stale(tmp_path: Path) -> None:
    with KeptDaemon(tmp_path, mutant="without doubt") as kept:
        kill_scenarios.nothing_happens(kept.wait_serving())
        with pytest.raises(AssertionError):
            kill_scenarios.a_map_in_doubt_is_undone(kept)
