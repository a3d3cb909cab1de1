"""A daemon whose log goes to a real systemd journal, in namespaces where there is one."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest

from fakes.daemon_process import DaemonProcess
from fakes.eventually import PATIENCE, eventually
from fakes.guide import NIGHT, commands
from fakes.puppet import ENVIRONMENT
from fakes.raw_client import RawConnection

JOURNALD: Final = Path("/lib/systemd/systemd-journald")
NAMESPACES: Final = ("unshare", "--mount", "--propagation", "private", "--pid", "--fork", "--kill-child")
JOURNAL: Final = f"""
set -e
mount -t proc proc /proc
mount -t tmpfs tmpfs /run
mkdir -p /run/systemd/journal /run/systemd/journald.conf.d
printf '[Journal]\\nStorage=volatile\\nReadKMsg=no\\nAudit=no\\n' > /run/systemd/journald.conf.d/test.conf
if [ ! -s /etc/machine-id ]; then
    echo 0123456789abcdef0123456789abcdef > /run/machine-id
    mount --bind /run/machine-id /etc/machine-id
fi
{JOURNALD} &
until [ -S /run/systemd/journal/socket -a -S /run/systemd/journal/stdout ]; do :; done
exec "$@"
"""
"""A shell script that runs a command beside a journal, which both see only there."""
ANNOUNCED: Final = 'JOURNAL_STREAM=$(stat -L -c %d:%i /proc/self/fd/2) exec "$@"'
"""Another, that says where standard error goes, as a service manager does (systemd.exec(5))."""


def works() -> bool:
    if os.geteuid() or not JOURNALD.exists() or not all(map(shutil.which, ("journalctl", "systemd-cat"))):
        return False
    command = (*NAMESPACES, "sh", "-c", "mount -t proc proc /proc && mount -t tmpfs tmpfs /run")
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


pytestmark = pytest.mark.skipif(
    not works(), reason="needs root, systemd-journald and namespaces: apt install systemd"
)


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[DaemonProcess]:
    """Its standard error is the journal."""
    command = (sys.executable, "-m", "interceptd")
    launch = (*NAMESPACES, "sh", "-c", JOURNAL, "sh", "systemd-cat", "sh", "-c", ANNOUNCED, "sh", *command)
    with DaemonProcess(tmp_path, launch=launch, config="limits.partitions_per_uid = 1") as process:
        yield process.wait_serving()


def inside(daemon: DaemonProcess, *command: str) -> str:
    """What a command prints in the daemon's namespaces."""
    (shell,) = Path(f"/proc/{daemon.pid}/task/{daemon.pid}/children").read_text().split()
    there = ("nsenter", "-t", shell, "--mount", "--pid", *command)
    environment = os.environ | ENVIRONMENT
    return subprocess.run(
        there, capture_output=True, text=True, check=True, timeout=PATIENCE, env=environment
    ).stdout


def entries(daemon: DaemonProcess, *matches: str) -> list[dict[str, Any]]:
    """What `journalctl` shows there."""
    inside(daemon, "journalctl", "--sync")
    told = inside(daemon, "journalctl", "--directory", "/run/log/journal", "--output", "json", *matches)
    return [json.loads(line) for line in told.splitlines()]


def test_the_journal_has_a_priority_and_a_field_for_each_fact(daemon: DaemonProcess) -> None:
    with RawConnection(daemon.socket) as connection:
        connection.send(b"G")
        assert connection.farewell().name == "EBADMSG"
    eventually(lambda: bool(entries(daemon, "INTERCEPTD_EVENT=connection_refused")), True)
    (refused,) = entries(daemon, "INTERCEPTD_EVENT=connection_refused")
    assert (refused["PRIORITY"], refused["SYSLOG_IDENTIFIER"], refused["INTERCEPTD_UID"]) == (
        "6",
        "interceptd",
        "0",
    )
    assert refused["INTERCEPTD_ERROR"] in refused["MESSAGE"]
    assert refused["_TRANSPORT"] == "journal"
    assert entries(daemon, "-p", "warning") == []
    (started,) = entries(daemon, "INTERCEPTD_EVENT=daemon_started")
    assert started["INTERCEPTD_SOCKET"] == str(daemon.socket)


GUILTY: Final = """
import os, sys
from fakes.raw_vmm import MODEL, RawVmm
from fakes.raw_client import RawConnection
with RawVmm(sys.argv[1]) as vmm, RawConnection(sys.argv[1]) as another:
    for _ in range(5):
        vmm.ask("set_policy", mmio_granularity="page")
    another.say_hello("vmm")
    another.refusal("create_partition", MODEL)
print(os.getpid())
"""
"""A VMM that has most lines in the log, and is refused a second partition. Ten lines fit the journal's queue
(net.unix.max_dgram_qlen, where no systemd raised it), so none is dropped."""


def test_the_commands_for_a_bad_night_name_the_guilty_process(daemon: DaemonProcess) -> None:
    """As deploy/THURSDAY_NIGHT.md prints them."""
    refused, flood, suspected = (
        command
        for section in ("No new VM starts", "The log floods", "The daemon restarts")
        for command in commands(section, NIGHT)
        if command.startswith("journalctl")
    )
    pid = inside(daemon, sys.executable, "-c", GUILTY, str(daemon.socket)).strip()
    eventually(lambda: len(entries(daemon, f"INTERCEPTD_PID={pid}")), 8)
    line = inside(daemon, "bash", "-c", refused).splitlines()[-1]
    assert {"limit=partitions_per_uid", f"pid={pid}"} < set(line.split())
    assert inside(daemon, "bash", "-c", flood).split()[:2] == ["8", pid]
    assert inside(daemon, "bash", "-c", suspected).splitlines()[-1:] in ([], ["-- No entries --"])
