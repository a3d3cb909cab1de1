"""Daemons that are killed at every step of a restore, and their successors at every step of their own."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final

import pytest

from fakes.kept_daemon import KeptDaemon
from fakes.killed_daemon import RESTORE_POINTS
from fakes.raw_client import RawConnection
from fakes.restore_asker import Asker
from fakes.restore_deeds import Deed, asks, asks_once, gives_back, hands_over, killed, touches, touches_all

pytestmark = [
    pytest.mark.verify,
    pytest.mark.skipif(
        os.geteuid() != 0 or not Path("/dev/userfaultfd").exists(),
        reason="needs /dev/userfaultfd, which root alone may open",
    ),
]
SUCCESSOR: Final = list(RESTORE_POINTS)[list(RESTORE_POINTS).index("restore found") :]
OWN: Final[Mapping[Deed, Sequence[str]]] = {
    asks: ["ledger stored", "listener stored", "image stored", "page list stored", "restore to be recorded",
           ],
    asks_once: ["restore recorded", "to be sent"],
    hands_over: ["hand-off connected", "hand-off seen", "memory to be stored", "memory stored",
                 "hand-off to be recorded", "hand-off recorded", "listener dropped", "edited"],
    touches: ["fault read", "brought in", "brought in and recorded"],
    gives_back: ["removal read", "event read", "gone", "removal forgotten", "unserved", "served",
                 "brought in"],
    touches_all: ["compacting", "to be committed", "committed", "compacted", "to be left to the kernel",
                  "left to the kernel", "unmapped all", "to be let go", "let go", "ended", "dropping",
                  "dropped"],
}  # fmt: skip
"""The points of each deed."""
FIRST: Final = [
    (asks_once, "restore recorded"),
    (hands_over, "hand-off connected"),
    (hands_over, "hand-off to be recorded"),
    (gives_back, "removal read"),
    (gives_back, "gone"),
    (touches, "brought in"),
]
"""Where the first daemon of a pair is killed."""


@pytest.fixture
def kept(tmp_path: Path) -> Iterator[KeptDaemon]:
    with KeptDaemon(tmp_path) as kept:
        yield kept.wait_serving()


@pytest.fixture
def asker(kept: KeptDaemon, tmp_path: Path) -> Iterator[Asker]:
    with RawConnection(kept.socket) as connection:
        yield Asker(connection, tmp_path)


@pytest.mark.parametrize("deed", OWN, ids=lambda deed: deed.__name__)
def test_a_kill_at_any_step_costs_a_wait(kept: KeptDaemon, asker: Asker, deed: Deed) -> None:
    for point in OWN[deed]:
        assert killed(kept, asker, deed, (point, 1)), point
    assert kept.deaths == len(OWN[deed])


@pytest.mark.parametrize(("deed", "point"), FIRST, ids=[f"{deed.__name__}-{point}" for deed, point in FIRST])
def test_a_successor_that_is_killed_has_a_successor(
    kept: KeptDaemon, asker: Asker, deed: Deed, point: str
) -> None:
    reached = {then for then in SUCCESSOR if killed(kept, asker, deed, (point, 1), (then, 1))}
    serves = {*SUCCESSOR} if deed not in (asks_once, hands_over) else {"restore found", "image open"}
    assert reached >= serves


def test_each_point_is_of_some_deed() -> None:
    assert {*RESTORE_POINTS} <= {*SUCCESSOR}.union(*OWN.values())
