"""A bad night with sixty VMMs of one uid: the commands of deploy/THURSDAY_NIGHT.md name the guilty ones.

They are run as the page prints them, but for where the log is; `test_journal.py` runs those of the journal.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Final

import pytest

from fakes.eventually import PATIENCE, eventually
from fakes.guide import ALERTS, NIGHT, commands
from fakes.hostile_tenant import QUICK, Attack, HostileTenant
from fakes.kept_daemon import KeptDaemon
from fakes.night import CONFIG, GUILTY, OTHERS, ROOM, ordinary
from intercept_client import BlockingVmm
from intercept_protocol.errors import WireError
from intercept_protocol.messages import AddressSpaceKind, HypervisorKind
from interceptd.recovery.returning import STRIKES

PROGRAMS: Final = Path(sys.executable).parent
pytestmark = [pytest.mark.verify, pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")]


class Operator:
    """Who was woken up, and has the page."""

    def __init__(self, kept: KeptDaemon, log: Path) -> None:
        self._log = log
        self._environment = os.environ | {
            "PATH": f"{PROGRAMS}:{os.environ['PATH']}",
            "INTERCEPTCTL_SOCKET": str(kept.operator_socket),
        }

    def type(self, section: str, nth: int = 0) -> list[str]:
        """The lines that a command of the page prints."""
        command = commands(section, NIGHT)[nth].replace("podman logs interceptd", f"cat {self._log}")
        done = subprocess.run(
            ["bash", "-c", f"set -o pipefail; {command}"],
            env=self._environment,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=True,
        )
        return done.stdout.splitlines()

    def first(self, section: str) -> dict[str, str]:
        """The first line of a table, by the headings."""
        heading, line, *_ = self.type(section)
        cells = re.split(r"\s+(?![KMG]iB)", line.strip())
        return dict(zip(heading.split(), cells, strict=False))

    def last_entry(self, nth: int) -> dict[str, object]:
        entry: dict[str, object] = json.loads(self.type("Where the log is JSON", nth)[-1])
        return entry


def limit_of_one_more(path: Path) -> object:
    """The limit that one more VM meets at its start; None if it starts."""
    with BlockingVmm.open(path, timeout=PATIENCE) as vmm:
        try:
            vmm.create_partition(AddressSpaceKind.DECLARED, HypervisorKind.SOFTWARE)
        except WireError as refusal:
            return refusal.details["limit"]
    return None


def test_each_command_of_the_page_names_the_guilty_vmm(tmp_path: Path) -> None:
    with KeptDaemon(tmp_path, config=CONFIG) as kept, ExitStack() as processes:
        kept.wait_serving()
        vmms: dict[Attack, HostileTenant] = {}
        for attack in (*OTHERS, *GUILTY):
            vmm = processes.enter_context(HostileTenant(attack, kept.socket, None, QUICK))
            assert vmm.go_on()
            vmms.setdefault(attack, vmm)
        stuck, hoard, leak, flood, poison = (vmms[attack] for attack in GUILTY)
        for vmm in (flood, stuck, hoard, leak, *(vmms[attack] for attack in dict.fromkeys(OTHERS))):
            assert vmm.go_on()
        operator = Operator(kept, tmp_path / "log")

        first = operator.first("VMs stall")
        assert (first["PID"], first["WAIT"], first["OPEN"]) == (str(stuck.pid), "1", "1")
        first = operator.first("Memory grows")
        assert (first["PID"], int(first["REGIONS"]) > 1000) == (str(hoard.pid), True)
        first = operator.first("No new VM starts")
        leaked = ROOM - len(OTHERS) - len(GUILTY) + 1
        assert (first["PID"], first["PARTITIONS"]) == (str(leak.pid), str(leaked))
        refused = operator.last_entry(0)
        assert (refused["limit"], refused["pid"], refused["uid"]) == (
            "partitions_per_uid",
            leak.pid,
            os.geteuid(),
        )
        most, *_ = operator.type("Where the log is JSON", 1)
        assert most.split()[1:] == ['"pid":', str(flood.pid)]

        kept.kill()
        eventually(lambda: kept.count("daemon_restarted"), 1)
        assert kept.count("request_suspected") == 0
        assert operator.first("No new VM starts")["PARTITIONS"] == str(leaked)
        assert limit_of_one_more(kept.socket) == "partitions_per_uid"
        leak.kill()
        eventually(lambda: limit_of_one_more(kept.socket), None)

        kept.plan(*[("carried out", 1)] * STRIKES)
        assert poison.go_on()
        suspected = operator.last_entry(2)
        assert (suspected["pid"], suspected["deaths"], suspected["method"]) == (poison.pid, 3, "unmap_vma")
        assert vmms[ordinary].go_on()


def test_the_page_names_alerts_that_there_are() -> None:
    there_are = set(re.findall(r"alert: (\w+)", ALERTS.read_text(encoding="utf-8")))
    named = set(re.findall(r"`(Interceptd\w+)`", NIGHT.read_text(encoding="utf-8")))
    assert len(named) > 5
    assert named <= there_are
