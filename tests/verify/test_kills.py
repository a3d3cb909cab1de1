"""Daemons that are killed at every step, and their successors at every step of their own."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

import pytest

from fakes import kill_scenarios
from fakes.kept_daemon import KeptDaemon
from fakes.kill_deeds import (
    DEEDS,
    Deed,
    adds,
    adds_pinned,
    announces,
    changes,
    changes_in_vain,
    comes_and_goes,
    has_its_policy_set,
    joins_a_notifier,
    joins_a_vp,
    killed,
    leaves,
    loses_a_notifier_that_has_begun,
    loses_a_vp,
    protects,
    removes,
    sets_the_policy,
    touches,
    unmaps,
    works_for_long,
)
from fakes.kill_scenarios import Scenario
from fakes.killed_daemon import POINTS
from fakes.raw_client import ConnectionClosed
from fakes.surviving_vmm import Mode, SurvivingVmm
from intercept_client import ConnectionLost

pytestmark = pytest.mark.verify

REQUEST: Final = ("peeked", "read", "noted", "to be sent", "sent", "marked", "wiped", "intercept read")
"""Points that every request has, the same in each mode."""
SEVERAL: Final = (
    "changing",
    "asked",
    "told",
    "to be edited",
    "edited",
    "settled",
    "connection stored",
    "joined",
    "dropping",
    "connection taken over",
    "joining again",
    "joined again",
)
"""Points of which a deed has several."""
MOST_CALLS: Final = 3
"""Of those, at which daemons are killed."""
SUCCESSOR: Final = list(POINTS)[list(POINTS).index("taking over") :]
MODES: Final = [mode for mode in Mode if mode is not Mode.DECLARED_VMM]
"""A VMM that declares its memory and has a hypervisor of its own is `ANNOUNCED_VMM` without system calls."""
JOINING: Final = frozenset({"accepted", "admitted", "connection stored", "joined"})
ENDING: Final = frozenset(
    {"ending", "unmapped all", "to be let go", "let go", "ended", "dropping", "dropped"}
)
LOGGED: Final = frozenset({"carried out", "done"})
CERTAIN: Final[Mapping[Deed, frozenset[str]]] = {
    comes_and_goes: JOINING | ENDING | LOGGED | {"ledger stored", "partition made", "partition recorded"},
    leaves: ENDING,
    joins_a_vp: JOINING,
    joins_a_notifier: JOINING | {"leaving", "left"},
    loses_a_vp: JOINING | {"leaving", "left"},
    loses_a_notifier_that_has_begun: frozenset({"leaving", "left"}),
    touches: frozenset({"to be edited", "edited"}),
    announces: LOGGED,
    works_for_long: frozenset({"compacting", "to be committed", "committed", "compacted"}),
    adds: LOGGED,
    adds_pinned: LOGGED | {"edited"},
    removes: LOGGED | {"edited"},
    changes: LOGGED | {"edited", "exchanging", "exchanged"},
    changes_in_vain: frozenset({"to be unmade", "to be put back", "put back"}),
    protects: LOGGED,
    sets_the_policy: frozenset({"policy"}),
    has_its_policy_set: frozenset({"policy"}),
}
"""Points that a deed has in each mode."""
CERTAIN_IF_WATCHED: Final[Mapping[Deed, frozenset[str]]] = {
    comes_and_goes: frozenset({"memory to be stored", "memory stored"}),
    unmaps: frozenset({"event unread", "event read", "gone", "event forgotten", "unserved", "served"}),
}
CERTAIN_IF_OWN: Final[Mapping[Deed, frozenset[str]]] = {
    touches: frozenset({"changing", "asked", "told", "settled"}),
}
"""With a hypervisor of the VMM's own."""
SCENARIOS: Final[Sequence[Scenario]] = [
    kill_scenarios.no_request_is_lost,
    kill_scenarios.an_intercept_is_sent_back,
    kill_scenarios.nothing_is_carried_out_twice,
    kill_scenarios.many_requests_of_a_client_survive_one_death_each,
    kill_scenarios.a_request_is_not_to_blame_before_it_is_carried_out,
    kill_scenarios.an_intercept_that_kills_daemons_ends_its_vp,
    kill_scenarios.a_kick_is_kept,
    kill_scenarios.an_open_range_stays_closed,
    kill_scenarios.a_vp_that_is_not_back_yet_has_its_index,
    kill_scenarios.a_refused_peer_sees_the_end,
    kill_scenarios.a_new_vp_is_welcomed_once_it_is_kept,
    kill_scenarios.framing_is_kept,
    kill_scenarios.a_map_in_doubt_is_undone,
    kill_scenarios.what_was_read_has_gone,
    kill_scenarios.what_was_recorded_has_gone,
    kill_scenarios.its_vmm_dies_while_it_is_down,
    kill_scenarios.restarts_as_planned,
    kill_scenarios.a_long_request_survives_any_number_of_restarts,
    kill_scenarios.a_second_keeper_is_refused,
]
FOUND_BY: Final[Mapping[str, Scenario]] = {
    "without inboxes": kill_scenarios.no_request_is_lost,
    "wiping before marking": kill_scenarios.framing_is_kept,
    "answering before recording": kill_scenarios.nothing_is_carried_out_twice,
    "welcoming before storing": kill_scenarios.a_new_vp_is_welcomed_once_it_is_kept,
    "closing without shutdown": kill_scenarios.a_refused_peer_sees_the_end,
    "without kept kicks": kill_scenarios.a_kick_is_kept,
    "confusing answers": kill_scenarios.a_map_in_doubt_is_undone,
    "without doubt": kill_scenarios.a_map_in_doubt_is_undone,
    "forgetting what went": kill_scenarios.what_was_recorded_has_gone,
    "forgetting the event read": kill_scenarios.what_was_read_has_gone,
    "forgetting begins": kill_scenarios.an_open_range_stays_closed,
}
"""The scenario that each mutant fails."""
FIRST: Final[Sequence[tuple[Mode, Deed, str, int]]] = [
    (Mode.DECLARED, adds, "carried out", 1),
    (Mode.DECLARED, announces, "done", 1),
    (Mode.ANNOUNCED, announces, "sent", 1),
    (Mode.WATCHED, unmaps, "gone", 1),
    (Mode.WATCHED_VMM, touches, "asked", 1),
    (Mode.WATCHED_VMM, changes, "edited", 3),
    (Mode.WATCHED_VMM, unmaps, "event read", 1),
    (Mode.DECLARED_VMM, joins_a_vp, "joined", 1),
    (Mode.ANNOUNCED_VMM, comes_and_goes, "memory stored", 1),
]
"""Where the first daemon of a pair is killed."""


def kill_everywhere(
    kept: KeptDaemon, vmm: SurvivingVmm, deed: Deed, points: Sequence[str], *before: tuple[str, int]
) -> set[str]:
    """Do it once for each point, and each of its first calls; returns the points that it has."""
    reached = set()
    for point in points:
        for call in range(1, MOST_CALLS + 1 if point in SEVERAL else 2):
            if not killed(kept, vmm, deed, *before, (point, call)):
                break
            reached.add(point)
    return reached


@pytest.mark.parametrize(
    ("mode", "deed"),
    [(mode, deed) for mode in MODES for deed, possible in DEEDS.items() if mode in possible],
    ids=lambda value: getattr(value, "__name__", "") or value.name,
)
def test_a_kill_at_any_step_costs_a_wait(tmp_path: Path, mode: Mode, deed: Deed) -> None:
    points = [point for point in POINTS if mode is Mode.DECLARED or point not in REQUEST]
    with KeptDaemon(tmp_path) as kept, SurvivingVmm(kept.wait_serving().socket, mode) as vmm:
        reached = kill_everywhere(kept, vmm, deed, points)
    print(f"\n{deed.__name__}, {mode.value}: {kept.deaths} deaths at {sorted(reached)}")
    assert reached >= certain(mode, deed)


def certain(mode: Mode, deed: Deed) -> set[str]:
    points = set(CERTAIN.get(deed, ()))
    if mode is Mode.DECLARED:
        points |= {"intercept read"}
    if mode.is_watched:
        points |= CERTAIN_IF_WATCHED.get(deed, frozenset())
    if mode.has_own_hypervisor:
        points |= CERTAIN_IF_OWN.get(deed, frozenset())
    return points


def test_each_point_is_certain_of_some_deed() -> None:
    found = {*REQUEST, *SUCCESSOR}.union(*(certain(mode, deed) for mode in MODES for deed in DEEDS))
    assert found == {*POINTS}


@pytest.mark.parametrize(
    ("mode", "deed", "point", "call"),
    FIRST,
    ids=[f"{mode.name}-{deed.__name__}-{point}" for mode, deed, point, _ in FIRST],
)
def test_a_successor_that_is_killed_has_a_successor(
    tmp_path: Path, mode: Mode, deed: Deed, point: str, call: int
) -> None:
    with KeptDaemon(tmp_path) as kept, SurvivingVmm(kept.wait_serving().socket, mode) as vmm:
        reached = kill_everywhere(kept, vmm, deed, SUCCESSOR, (point, call))
    print(f"\n{deed.__name__}, {mode.value}: {kept.deaths} deaths at {sorted(reached)}")
    assert reached >= set(SUCCESSOR) - {"linked", "memory attached"}


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.__name__)
def test_it_survives(tmp_path: Path, scenario: Scenario) -> None:
    with KeptDaemon(tmp_path) as kept:
        scenario(kept.wait_serving())
        assert kept.troubles() == set()


def test_the_loss_of_its_hypervisor_meanwhile_ends_a_partition_alone(tmp_path: Path) -> None:
    with KeptDaemon(tmp_path) as kept:
        kill_scenarios.its_hypervisor_leaves_while_it_is_down(kept.wait_serving())
        assert kept.troubles() == {"partition_lost"}


def test_what_is_spoilt_ends_alone(tmp_path: Path) -> None:
    with KeptDaemon(tmp_path, launch=(sys.executable, "-m", "fakes.spoiling_keeper")) as kept:
        kill_scenarios.what_is_spoilt_ends_alone(kept.wait_serving())
        assert kept.troubles() == {"partition_not_recovered", "passed_descriptor_not_used"}


@pytest.mark.parametrize("mutant", FOUND_BY)
def test_a_daemon_without_a_safeguard_does_not(tmp_path: Path, mutant: str) -> None:
    """But it serves as well as any while it lives."""
    with KeptDaemon(tmp_path, mutant=mutant) as kept:
        kill_scenarios.nothing_happens(kept.wait_serving())
        with pytest.raises((AssertionError, ConnectionLost, ConnectionClosed)):
            FOUND_BY[mutant](kept)
