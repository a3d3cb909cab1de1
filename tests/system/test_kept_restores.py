"""A daemon that is killed while it restores guests: the next one goes on with each."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

import pytest

from fakes.kept_daemon import KeptDaemon
from fakes.raw_client import RawConnection
from fakes.restore_asker import PAGES, Asker, numbers
from fakes.restore_deeds import Deed, asks, asks_once, gives_back, hands_over, killed, touches, touches_all
from fakes.restoring_vmm import RestoringVmm

pytestmark = pytest.mark.skipif(
    os.geteuid() != 0 or not Path("/dev/userfaultfd").exists(),
    reason="needs /dev/userfaultfd, which root alone may open",
)


@pytest.fixture
def kept(tmp_path: Path) -> Iterator[KeptDaemon]:
    with KeptDaemon(tmp_path) as kept:
        yield kept.wait_serving()


@pytest.fixture
def asker(kept: KeptDaemon, tmp_path: Path) -> Iterator[Asker]:
    with RawConnection(kept.socket) as connection:
        yield Asker(connection, tmp_path)


STEPS: Final[Sequence[tuple[Deed, str]]] = [
    (asks, "image stored"),
    (asks_once, "restore recorded"),
    (hands_over, "hand-off connected"),
    (hands_over, "hand-off to be recorded"),
    (touches, "fault read"),
    (touches, "brought in"),
    (gives_back, "removal read"),
    (gives_back, "gone"),
    (touches_all, "to be committed"),
    (touches_all, "left to the kernel"),
]
"""The whole matrix is in `tests/verify/test_kept_restores.py`."""


def test_a_kill_at_a_step_costs_a_wait(kept: KeptDaemon, asker: Asker) -> None:
    for deed, point in STEPS:
        assert killed(kept, asker, deed, (point, 1)), (deed.__name__, point)
    assert kept.deaths == len(STEPS)
    assert kept.stop() == 0


def test_a_restore_that_waits_and_one_that_serves_go_on(kept: KeptDaemon, asker: Asker) -> None:
    restored = asker.restore(around_pages=1)
    kept.wait_idle().kill()
    assert asker.progress(restored)["state"] == "waiting"
    with RestoringVmm(asker.listener, [PAGES - 100, 100]) as vmm:
        assert vmm.ask("read", 5, 3) == numbers(5, 3)
        assert vmm.ask("give_back", 6, 1) == "given back"
        assert vmm.ask("give_back", 600, 2) == "given back"
        kept.wait_idle().kill()
        assert vmm.ask("read", 4, 5) == "4 5 0 7 8"
        assert vmm.ask("read", 599, 4) == "599 0 0 602"
        progress = asker.progress(restored)
        assert (progress["state"], progress["removed_pages"], progress["pid"]) == ("serving", 3, vmm.pid)
        kept.wait_idle().kill()
        assert vmm.ask("read", 603, PAGES - 603) == numbers(603, PAGES - 603)
        assert vmm.ask("read", 0, 5) == numbers(0, 5)
        vmm.ask("read", 0, PAGES)
        asker.wait_state(restored, "complete")
    asker.wait_state(restored, "ended")
    assert kept.stop() == 0
    assert not kept.troubles()
