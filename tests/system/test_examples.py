"""The examples of the documents, each run as it stands there, against a daemon."""

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
"""Where the documents have the sockets."""


def examples(document: str) -> list[str]:
    text = (ROOT / document).read_text(encoding="utf-8")
    return re.findall(r"^```python\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)


[VMM] = examples("README.md")
[HEARING, HANDING_OVER] = examples("clients/README.md")


@pytest.fixture
def daemon(start_daemon: StartDaemon) -> DaemonProcess:
    return start_daemon()


def command(example: str, daemon: DaemonProcess) -> list[str]:
    assert DIRECTORY in example
    return [sys.executable, "-c", example.replace(DIRECTORY, str(daemon.socket.parent))]


@pytest.mark.parametrize("example", [VMM, HANDING_OVER], ids=["vmm", "handing over"])
def test_an_example_prints_what_it_says_beside(example: str, daemon: DaemonProcess) -> None:
    said = re.findall(r"print\(.*\)  # (.*)$", example, flags=re.MULTILINE)
    run = subprocess.run(
        command(example, daemon), capture_output=True, text=True, timeout=PATIENCE, check=False
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
