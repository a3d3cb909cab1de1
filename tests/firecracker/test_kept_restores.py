"""Daemons that are killed under a real Firecracker, which notices nothing but a wait: it hands over once."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from fakes.kept_daemon import KeptDaemon
from firecracker.content import PAGE
from firecracker.machine import MIB, Snapshot
from firecracker.restoring import SAVED_MIB, Restores, all_memory, pages

pytestmark = pytest.mark.verify
ALL: Final = all_memory(SAVED_MIB)
KILLS: Final = [("brought in", 200), ("brought in and recorded", 150), ("brought in", 1), ("image open", 1),
                ("brought in", 255)]  # fmt: skip
"""Each with how many faults its daemon serves before; the guest has some thirty thousand."""


@pytest.fixture
def kept(kernel: Path, tmp_path: Path) -> Iterator[KeptDaemon]:  # noqa: ARG001 - skips without a Firecracker
    with KeptDaemon(tmp_path) as kept:
        yield kept.wait_serving()
        assert not kept.troubles()


@pytest.fixture
def restores(kept: KeptDaemon, tmp_path: Path) -> Iterator[Restores]:
    with Restores(kept.socket, tmp_path / "guests") as restores:
        yield restores


def test_daemons_are_killed_in_the_middle_of_faults(
    saved: Snapshot, restores: Restores, kept: KeptDaemon
) -> None:
    guest = restores.start(saved, around_pages=1)
    kept.plan(*KILLS)
    assert guest.looks(*ALL) == guest.must_find(*ALL)
    assert kept.reached
    assert kept.deaths == len(KILLS)


@pytest.mark.parametrize("point", ["removal read", "event read", "gone", "unserved", "served"])
def test_a_daemon_is_killed_between_a_removal_and_its_effect(
    saved: Snapshot, restores: Restores, kept: KeptDaemon, point: str
) -> None:
    """The balloon is inflated over pages that are in and pages that are not."""
    guest = restores.start(saved, around_pages=16)
    assert guest.looks(pages(40 * MIB, 41 * MIB)) == guest.must_find(pages(40 * MIB, 41 * MIB))
    kept.plan((point, 1))
    guest.inflate(41 * MIB // PAGE - 100, 200)
    assert guest.looks(*ALL) == guest.must_find(*ALL)
    assert kept.reached


@pytest.mark.parametrize("point", ["hand-off connected", "hand-off to be recorded", "listener dropped"])
def test_a_daemon_is_killed_while_firecracker_hands_its_memory_over(
    saved: Snapshot, restores: Restores, kept: KeptDaemon, point: str
) -> None:
    kept.plan((point, 1))
    guest = restores.start(saved, prefetch=[(0, 1000)])
    assert guest.looks(*ALL) == guest.must_find(*ALL)
    assert kept.reached
