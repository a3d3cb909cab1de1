"""A daemon and a VMM of an ordinary user, and in separate user and pid namespaces: the same answers.

In a user namespace without a map everybody looks like the overflow uid, which is let in only where it is
configured; another pid namespace shows no pid.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from fakes import as_user
from fakes import live_changes as changes
from fakes import live_lives as lives
from fakes.daemon_process import DaemonProcess
from fakes.eventually import PATIENCE, eventually
from fakes.live_vmm import GFN, LiveVmm, Memory
from fakes.puppet import ENVIRONMENT, Puppet, StartVmm, VmmFailed
from intercept_client.memory import Watch
from intercept_protocol.outcomes import Answer

USER, OTHER_USER, OVERFLOW = 61001, 61002, 65534
UNSHARED = ("unshare", "--user", "--pid", "--fork", "--mount-proc", "--kill-child")
OPEN_TO_ALL = f"socket_mode = 0o666\nallowed_uids = [0, {os.geteuid()}, {USER}, {OTHER_USER}, {OVERFLOW}]"


def runs(*command: str) -> bool:
    try:
        return subprocess.run(command, capture_output=True, check=False).returncode == 0
    except OSError:
        return False


needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can act as another user")
needs_namespaces = pytest.mark.skipif(
    not runs(*UNSHARED, sys.executable, "-c", "import interceptd"),
    reason="user and pid namespaces cannot be made here",
)


@pytest.fixture
def public_directory() -> Iterator[Path]:
    """A directory that any user may use; the test's own one is not."""
    directory = Path(tempfile.mkdtemp(prefix="interceptd-"))
    directory.chmod(0o777)
    yield directory
    shutil.rmtree(directory)


def serve_live_memory(daemon: Path, vmm: Puppet, *, watch: Watch) -> tuple[object, ...]:
    """One round: a fault, a change, what is left, and the fault that follows."""
    vmm.do(LiveVmm.connect, daemon)
    vmm.do(LiveVmm.attach, watch, promise=watch is Watch.NONE)
    memory = vmm.do(LiveVmm.map_memfd, changes.PAGES)
    kind = vmm.do(LiveVmm.add_region, GFN, memory.uaddrs, "auto")
    first = vmm.do(LiveVmm.fault, GFN)
    change(vmm, memory, watch)
    vmm.do(LiveVmm.drain)
    left = vmm.do(LiveVmm.reached, GFN, changes.PAGES)
    return kind, first, left, vmm.do(LiveVmm.fault, GFN + 5)


def change(vmm: Puppet, memory: Memory, watch: Watch) -> None:
    how = {Watch.REQUIRED: changes.munmap_of_a_part, Watch.NONE: changes.announced_munmap_of_a_part}
    vmm.do(how[watch], memory)


REST = [0, 1, 2, 3, *range(8, changes.PAGES)]
SERVED = ("movable", Answer.MAPPED, REST, Answer.UNBACKED)

watches = pytest.mark.parametrize("watch", [Watch.REQUIRED, Watch.NONE])


@needs_root
@pytest.mark.parametrize(
    ("watch", "daemon_uid", "vmm_uid"),
    [
        (Watch.REQUIRED, USER, USER),
        (Watch.REQUIRED, 0, USER),
        (Watch.REQUIRED, USER, 0),
        (Watch.REQUIRED, USER, OTHER_USER),
        (Watch.NONE, USER, OTHER_USER),
    ],
)
def test_a_users_memory_is_served_by_any_users_daemon(
    public_directory: Path, start_vmm: StartVmm, watch: Watch, daemon_uid: int, vmm_uid: int
) -> None:
    command = (*as_user.launch(daemon_uid), sys.executable, "-m", "interceptd")
    with DaemonProcess(
        public_directory, config=OPEN_TO_ALL, launch=command, environment=ENVIRONMENT
    ) as daemon:
        daemon.wait_serving()
        vmm = start_vmm(launch=as_user.launch(vmm_uid))
        assert serve_live_memory(daemon.socket, vmm, watch=watch) == SERVED


@needs_namespaces
@watches
def test_a_vmm_in_namespaces_of_its_own_is_served(
    public_directory: Path, start_vmm: StartVmm, watch: Watch
) -> None:
    with DaemonProcess(public_directory, config=OPEN_TO_ALL) as daemon:
        daemon.wait_serving()
        vmm = start_vmm(launch=UNSHARED)
        assert vmm.own_pid == 1
        assert serve_live_memory(daemon.socket, vmm, watch=watch) == SERVED


@needs_namespaces
@watches
def test_a_daemon_and_a_vmm_each_in_namespaces_of_its_own_meet_as_overflow_uids(
    public_directory: Path, start_vmm: StartVmm, watch: Watch
) -> None:
    with DaemonProcess(
        public_directory,
        config=f"socket_mode = 0o666\nallowed_uids = [{OVERFLOW}]",
        launch=(*UNSHARED, sys.executable, "-m", "interceptd"),
    ) as daemon:
        eventually(daemon.socket.exists, True)
        assert serve_live_memory(daemon.socket, start_vmm(launch=UNSHARED), watch=watch) == SERVED


@needs_namespaces
def test_the_overflow_uid_is_refused_where_it_is_not_configured(
    public_directory: Path, start_vmm: StartVmm
) -> None:
    """Also by a daemon that is itself without a name in its namespace."""
    with DaemonProcess(
        public_directory,
        config="socket_mode = 0o666",
        launch=(*UNSHARED, sys.executable, "-m", "interceptd"),
    ) as daemon:
        eventually(daemon.socket.exists, True)
        with pytest.raises(VmmFailed, match="EACCES") as refused:
            start_vmm(launch=UNSHARED).do(LiveVmm.connect, daemon.socket)
    assert "overflow" in refused.value.text


@needs_namespaces
def test_an_exercise_by_the_overflow_uid_is_served_by_its_own_daemon() -> None:
    """As which many containers run."""
    command = (sys.executable, "-m", "interceptctl", "exercise", "--quiet", "--steps", "20", "--vps", "2")
    run = subprocess.run([*UNSHARED, *command], capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert (run.returncode, run.stdout[:5], run.stderr) == (0, "PASS:", "")


@needs_namespaces
def test_an_exec_in_other_namespaces_is_noticed(public_directory: Path, start_vmm: StartVmm) -> None:
    with DaemonProcess(public_directory, config=OPEN_TO_ALL) as daemon:
        daemon.wait_serving()
        vmm = start_vmm(launch=UNSHARED)
        partition_id = vmm.do(LiveVmm.connect, daemon.socket)
        vmm.do(LiveVmm.attach, Watch.REQUIRED, promise=False)
        vmm.do(lives.exec_something_else_with_the_sockets)
        eventually(lambda: partition_id in daemon.partition_ids(), False)
