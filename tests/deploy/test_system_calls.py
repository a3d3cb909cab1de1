"""The services' system call filter allows what the daemon really calls."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fakes.daemon_process import DaemonProcess
from fakes.eventually import PATIENCE, eventually
from fakes.raw_client import RawConnection
from fakes.witness import Witness

UNIT = Path(__file__).parents[2] / "deploy" / "systemd" / "interceptd.service"
STRACE, ANALYZE = shutil.which("strace"), shutil.which("systemd-analyze")
ALWAYS = ("@default", "execve")
"""What systemd always allows, and what it starts the service with."""


def members(group: str) -> frozenset[str]:
    """The system calls of a group of systemd's, those of the groups in it too; a call is its own group."""
    if not group.startswith("@"):
        return frozenset({group})
    command = [str(ANALYZE), "--no-pager", "syscall-filter", group]
    listed = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=True).stdout
    names = [line.strip() for line in listed.splitlines()[1:] if not line.strip().startswith("#")]
    return frozenset().union(*(members(name) for name in names if name))


def allowed() -> frozenset[str]:
    """What the unit's lines leave, in their order: the first allows, ~ removes, later ones add."""
    calls = frozenset().union(*map(members, ALWAYS))
    for tilde, names in re.findall(r"^SystemCallFilter=(~?)(.+)$", UNIT.read_text(), re.MULTILINE):
        named = frozenset().union(*map(members, names.split()))
        calls = calls - named if tilde else calls | named
    return calls


def ask_operator(daemon: DaemonProcess, method: str, **fields: object) -> None:
    with RawConnection(daemon.operator_socket) as operator:
        operator.say_hello("operator")
        operator.ask(method, fields)


@pytest.mark.skipif(
    None in (STRACE, ANALYZE), reason="needs strace and systemd-analyze, of Debian's strace and systemd"
)
def test_a_daemons_life_needs_no_system_call_that_its_unit_refuses(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    keep = [sys.executable, "-m", "interceptd", "keep", "--"]
    with DaemonProcess(tmp_path, launch=[str(STRACE), "-f", "-qq", "-o", str(trace), *keep]) as daemon:
        daemon.wait_serving()
        with Witness(daemon.socket) as witness:
            assert witness.serve() == Witness.SERVED
            ask_operator(daemon, "restart")
            eventually(lambda: daemon.events().count("daemon_started"), 2)
            assert Witness.SERVED in (witness.serve(), witness.serve())  # its VP may have been kicked once
        ask_operator(daemon, "drain", timeout_ms=5000)
        assert daemon.wait_ended() == 0
    called = set(re.findall(r"^\d+ +(\w+)\(", trace.read_text(), re.MULTILINE))
    assert "accept4" in called
    assert called - allowed() == set()
