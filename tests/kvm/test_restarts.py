"""A daemon is killed while a guest's memory becomes a stranger's, and what such a run must not overlook."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import partial

import pytest
import trio

from exercise.running import WITHOUT_INVALIDATION
from fakes.eventually import eventually
from intercept_client.kvm import Coverage, PartitionSetting
from interceptctl.exercise.daemon_process import KEPT_DAEMON, UNKEPT_DAEMON, PrivateDaemon, running_daemon
from interceptctl.guest.restarts import COUNTER_GPA, HandedOver, Noticed, Wrong
from interceptctl.guest.small_vmm import SmallVmm

MANY = 100
"""Kills, with each coverage."""


def played(
    kills: int,
    coverage: Coverage = Coverage.ANNOUNCED,
    command: Sequence[str] = KEPT_DAEMON,
    *,
    by_force: bool = True,
) -> Noticed:
    """What one guest noticed; a kill that is not `by_force` does nothing."""

    def play(daemon: PrivateDaemon) -> Noticed:
        with SmallVmm(daemon.path, PartitionSetting(coverage=coverage)) as vmm:
            kill = daemon.kill if by_force else partial(_let_it_count, vmm)
            return HandedOver(vmm, kill, random.Random(1)).run(kills)

    async def run() -> Noticed:
        async with running_daemon(command) as daemon:
            return await trio.to_thread.run_sync(play, daemon)

    return trio.run(run)


def _let_it_count(vmm: SmallVmm) -> None:
    """Kill nothing, and take as long as the guest needs to count on."""
    before = vmm.ram.word(COUNTER_GPA)
    eventually(lambda: vmm.ram.word(COUNTER_GPA) != before, True)


@pytest.mark.usefixtures("kvm")
def test_a_guest_whose_memory_is_watched_survives_a_kill() -> None:
    noticed = played(1, Coverage.WATCHED)
    assert (noticed.kills, noticed.changes > 0) == (1, True)
    assert noticed.longest_stall > 0


@pytest.mark.verify
@pytest.mark.usefixtures("kvm")
@pytest.mark.parametrize("coverage", list(Coverage))
def test_a_guest_survives_many_kills(coverage: Coverage) -> None:
    noticed = played(MANY, coverage)
    print(
        f"\n{coverage.name.lower()}: {noticed}; stale 0, lost 0, twice 0; the counter stood still for "
        f"{noticed.longest_standstill * 1e3:.0f} ms at most"
    )
    assert noticed.kills == MANY
    assert noticed.changes > 0


@pytest.mark.usefixtures("kvm")
def test_a_daemon_that_revokes_nothing_is_detected() -> None:
    with pytest.raises(Wrong, match="stranger's memory"):
        played(5, command=WITHOUT_INVALIDATION, by_force=False)


@pytest.mark.usefixtures("kvm")
def test_a_kill_without_a_restart_is_detected() -> None:
    with pytest.raises(Wrong, match="0 restarts after 1 kills"):
        played(1, command=UNKEPT_DAEMON, by_force=False)
