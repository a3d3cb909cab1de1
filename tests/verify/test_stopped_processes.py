"""The daemon and a VMM are stopped for ten seconds (SIGSTOP): no other peer is affected."""

from __future__ import annotations

import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import pytest

from fakes.daemon_process import DaemonProcess
from fakes.eventually import PATIENCE, eventually
from fakes.puppet import TESTS
from fakes.scripted_session import MESSAGES
from fakes.witness import Witness

pytestmark = pytest.mark.verify

SECONDS: Final = 10.0
"""Beyond every timeout of the daemon's defaults."""


@pytest.fixture
def config() -> str:
    return ""


@pytest.fixture
def daemon(tmp_path: Path, config: str) -> Iterator[DaemonProcess]:
    with DaemonProcess(tmp_path, config=config) as process:
        yield process.wait_serving()
        assert process.stop() == 0


@contextmanager
def playing(daemon: DaemonProcess, hypervisor: str) -> Iterator[subprocess.Popen[str]]:
    """A VMM that plays one session after the other, each answer of which it checks."""
    command = [sys.executable, "-m", "fakes.scripted_session", str(daemon.socket), hypervisor, "0"]
    with subprocess.Popen(
        command, cwd=TESTS, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as player:
        try:
            assert player.stdout is not None
            assert player.stdout.readline() == "playing\n"
            yield player
        finally:
            player.kill()


def sessions_played(player: subprocess.Popen[str]) -> int:
    """End it after its session, all of which it must have been told right."""
    said, _ = player.communicate(timeout=PATIENCE)
    assert player.returncode == 0
    return int(said)


def pass_time() -> None:
    select.select([], [], [], SECONDS)


@pytest.mark.parametrize("hypervisor", MESSAGES)
def test_a_stopped_daemon_continues_where_it_was(daemon: DaemonProcess, hypervisor: str) -> None:
    with Witness(daemon.socket) as witness:
        before = daemon.footprint()
        with playing(daemon, hypervisor) as player:
            daemon.signal(signal.SIGSTOP)
            pass_time()
            daemon.signal(signal.SIGCONT)
            assert witness.serve() == Witness.SERVED
            assert sessions_played(player) > 1
        assert daemon.statistics()["partitions_lost"] == 0
        eventually(daemon.footprint, before)


@pytest.mark.parametrize("config", [f"timeouts.hello_ms = {3 * SECONDS * 1000:.0f}"], ids=["patient"])
def test_a_stopped_vmm_continues_and_no_other_waited_for_it(daemon: DaemonProcess) -> None:
    """It may be stopped before one of its hellos, which the daemon would not wait for so long (H-2)."""
    with Witness(daemon.socket) as witness:
        before = daemon.footprint()
        with playing(daemon, "software") as player:
            player.send_signal(signal.SIGSTOP)
            assert [witness.serve() for _ in range(10)] == [Witness.SERVED] * 10
            pass_time()
            assert witness.serve() == Witness.SERVED
            player.send_signal(signal.SIGCONT)
            assert sessions_played(player) > 1
        eventually(daemon.footprint, before)


def test_a_stopped_vmm_with_its_own_hypervisor_delays_only_itself(
    daemon: DaemonProcess,
) -> None:
    """Its partition may be lost: only it could carry out the unmap."""
    with Witness(daemon.socket) as witness:
        before = daemon.footprint()
        with playing(daemon, "vmm") as player:
            player.send_signal(signal.SIGSTOP)
            pass_time()
            assert witness.serve() == Witness.SERVED
            player.send_signal(signal.SIGCONT)
            player.communicate(timeout=PATIENCE)
        eventually(daemon.footprint, before)
        assert witness.serve() == Witness.SERVED
