"""The clients' examples, each run as it stands in their README, against a daemon."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from fakes.daemon_process import DaemonProcess, StartDaemon
from fakes.eventually import PATIENCE, eventually
from fakes.raw_vmm import RawVmm

ROOT = Path(__file__).parents[2]
DIRECTORY = "/tmp/interceptd"
"""Where the document has the sockets."""


[HEARING, HANDING_OVER] = re.findall(
    r"^```python\n(.*?)^```",
    (ROOT / "clients" / "README.md").read_text(encoding="utf-8"),
    flags=re.DOTALL | re.MULTILINE,
)


@pytest.fixture
def daemon(start_daemon: StartDaemon) -> DaemonProcess:
    return start_daemon()


def command(example: str, daemon: DaemonProcess) -> list[str]:
    assert DIRECTORY in example
    return [sys.executable, "-c", example.replace(DIRECTORY, str(daemon.socket.parent))]


def test_the_example_of_handing_over_prints_what_it_says_beside(daemon: DaemonProcess) -> None:
    said = re.findall(r"print\(.*\)  # (.*)$", HANDING_OVER, flags=re.MULTILINE)
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
