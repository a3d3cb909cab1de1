"""The clients' examples, each run as it stands in their README, against a daemon."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from fakes.daemon_process import DaemonProcess, StartDaemon
from fakes.documents import HANDING_OVER, HEARING, at, printed
from fakes.eventually import PATIENCE, eventually
from fakes.raw_vmm import RawVmm


@pytest.fixture
def daemon(start_daemon: StartDaemon) -> DaemonProcess:
    return start_daemon()


def command(example: str, daemon: DaemonProcess) -> list[str]:
    return [sys.executable, "-c", at(example, daemon.socket.parent)]


def test_the_handover_example_prints_what_its_comments_say(daemon: DaemonProcess) -> None:
    said = printed(HANDING_OVER)
    run = subprocess.run(
        command(HANDING_OVER, daemon), capture_output=True, text=True, timeout=PATIENCE, check=False
    )
    assert (run.stdout.splitlines(), run.stderr) == (said, "")
    assert said[0] == "resume mapped"


def test_the_example_of_hearing_tells_of_a_lost_partition(daemon: DaemonProcess, tmp_path: Path) -> None:
    told = tmp_path / "told"

    def is_told_of_one_more() -> bool:
        with RawVmm(daemon.socket, hypervisor="vmm") as vmm:
            vmm.link().close()
            vmm.connection.receive()
        return "is lost: " in told.read_text()

    with told.open("w") as output:
        listening = subprocess.Popen([sys.executable, "-u", *command(HEARING, daemon)[1:]], stdout=output)
    with listening:
        eventually(is_told_of_one_more, True)
        listening.kill()
