"""The units under a real systemd, which is process 1 of its own namespaces: what outlives a daemon, and when
everything is let go."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from fakes.booted_systemd import PLACE, BootedSystemd, obstacle
from fakes.eventually import PATIENCE, eventually
from fakes.surviving_vmm import Mode, SurvivingVmm
from fakes.witness import Witness

pytestmark = pytest.mark.skipif(bool(obstacle()), reason=obstacle())

SERVICE, SOCKET, TEMPLATE = "interceptd.service", "interceptd.socket", "interceptd@.service"
WEB, OTHER = "interceptd@web.service", "interceptd@other.service"
CONTROL = f"{PLACE}/bin/interceptctl"
CONFIG = "allowed_uids = [0]\n"
NOT_VALID = "no_such_key = 1\n"
HANGS = "#!/bin/sh\nexec sleep infinity\n"


@pytest.fixture
def system(tmp_path: Path) -> Iterator[BootedSystemd]:
    """With the sockets of the one daemon open; nothing else runs."""
    with BootedSystemd(tmp_path / "system", [SERVICE, SOCKET, TEMPLATE], config=CONFIG) as system:
        system.systemctl("start", SOCKET)
        yield system


def vmm_socket(system: BootedSystemd, instance: str = "") -> Path:
    return system.root / "run/interceptd" / instance / "vmm.sock"


def kinds(names: list[str]) -> list[str]:
    """Of what is passed, without the keys of connections."""
    return sorted({name if "-" in name or name in ("vmm", "operator") else name[0] for name in names})


def succeed(system: BootedSystemd, vmm: SurvivingVmm, restart: Callable[[], object], unit: str) -> int:
    """Another daemon follows, with the same partition and all that it had. Returns the new pid."""
    before, restarts = system.main_pid(unit), vmm.vmm.statistics().restarts
    restart()
    vmm.touch(vmm.add(vmm.new_region(3)))
    vmm.check()
    assert vmm.vmm.statistics().restarts == restarts + 1
    assert system.main_pid(unit) not in (0, before)
    return system.main_pid(unit)


def is_let_go(vmm: SurvivingVmm) -> None:
    """Its connections end."""
    with pytest.raises(OSError, match="connection"):
        vmm.vmm.statistics()


def test_a_partition_outlives_each_end_of_a_daemon_that_is_followed_by_another(system: BootedSystemd) -> None:
    with SurvivingVmm(vmm_socket(system), Mode.WATCHED) as vmm:
        vmm.touch(vmm.add(vmm.new_region(3)))
        operator = (system.root / "run/interceptd/operator.sock").stat()
        for restart in (
            lambda: system.systemctl("restart", SERVICE),
            lambda: system.systemctl("kill", "--signal=KILL", "--kill-who=main", SERVICE),
            lambda: system.run(CONTROL, "restart"),
        ):
            succeed(system, vmm, restart, SERVICE)
        assert kinds(system.passed(SERVICE)) == ["c", "d", "m", "own-operator", "p", "vmm"]
        assert (system.root / "run/interceptd/operator.sock").stat().st_ino == operator.st_ino
