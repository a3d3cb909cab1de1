"""A partition that lives and has nothing mapped: log, `ls`, `show` and `stats` say why."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest
from click.testing import CliRunner

from fakes import as_user
from fakes.daemon_process import DaemonProcess
from fakes.eventually import eventually
from fakes.live_silence import PAGES, refuse_userfaultfds, touch_new_region, try_without_user_mode_only
from fakes.live_vmm import GFN, LiveVmm
from fakes.puppet import ENVIRONMENT, Puppet, StartVmm
from intercept_client.memory import USERFAULTFD_SYSCTL, Watch
from intercept_protocol.outcomes import Answer
from interceptctl.cli import main

USER: Final = 61001
DEFAULT_PROFILE: Final = "EPERM, as under a container's default seccomp profile"
IN_ANOTHER_PID_NAMESPACE: Final = ("unshare", "--pid", "--fork", "--kill-child")
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can act as another user")
needs_pid_namespaces = pytest.mark.skipif(
    shutil.which("unshare") is None
    or subprocess.run([*IN_ANOTHER_PID_NAMESPACE, "true"], capture_output=True, check=False).returncode != 0,
    reason="pid namespaces cannot be made here",
)


def lines_of(daemon: DaemonProcess, partition_id: int) -> list[dict[str, Any]]:
    """What the log says of a partition, but for how it began."""
    lines = [line for line in daemon.log_lines() if line.get("partition_id") == partition_id]
    return [line for line in lines if line["event"] not in ("partition_created", "long_step")]


def told(daemon: DaemonProcess, *arguments: object) -> str:
    """By the operator's tool; lines are joined."""
    command = ["--socket", str(daemon.operator_socket), *map(str, arguments)]
    return " ".join(CliRunner().invoke(main, command).output.split())


@pytest.fixture
def refused(start_vmm: StartVmm) -> Puppet:
    """A VMM under a seccomp filter."""
    vmm = start_vmm()
    vmm.do(refuse_userfaultfds)
    return vmm


def test_a_vmm_that_was_refused_a_userfaultfd_and_promises_nothing_is_warned_about(
    refused: Puppet, daemon: DaemonProcess
) -> None:
    partition_id = refused.do(LiveVmm.connect, daemon.socket)
    refused.do(LiveVmm.attach, Watch.IF_POSSIBLE, promise=False)
    assert refused.do(touch_new_region) is Answer.UNBACKED
    assert [(line["event"], line["level"], line["error"]) for line in lines_of(daemon, partition_id)] == [
        (
            "memory_not_watched",
            "warning",
            f"the VMM was refused a userfaultfd ({DEFAULT_PROFILE}) and promises no begin and end: "
            "nothing is mapped",
        ),
        ("faults_unbacked", "warning", "there is no userfaultfd and no promise to announce changes"),
    ]
    shown = told(daemon, "show", partition_id)
    assert "watch none: nothing is mapped without a userfaultfd or promise_begin_end; the VMM" in shown
    assert DEFAULT_PROFILE in shown
    assert "unannounced neither a userfaultfd nor promise_begin_end 1" in shown
    listed = json.loads(told(daemon, "ls", "--json"))["partitions"]
    assert [each["watch"] for each in listed if each["partition_id"] == partition_id] == ["none"]


def test_a_vmm_that_was_refused_a_userfaultfd_and_promises_is_served_without_a_warning(
    refused: Puppet, daemon: DaemonProcess
) -> None:
    partition_id = refused.do(LiveVmm.connect, daemon.socket)
    refused.do(LiveVmm.attach, Watch.IF_POSSIBLE, promise=True)
    assert refused.do(touch_new_region) is Answer.MAPPED
    assert lines_of(daemon, partition_id) == []
    shown = told(daemon, "show", partition_id)
    assert "watch promised: the VMM announces each change of its memory" in shown
    assert DEFAULT_PROFILE in shown


def test_a_vmm_that_hands_over_no_userfaultfd_without_a_reason_is_warned_about(
    unattached: Puppet, daemon: DaemonProcess
) -> None:
    unattached.do(LiveVmm.attach, Watch.NONE, promise=False)
    (line,) = lines_of(daemon, daemon.partition_ids()[-1])
    assert line["error"] == (
        "the VMM handed over no userfaultfd and promises no begin and end: nothing is mapped"
    )


def test_faults_before_the_handover_are_told_once_and_counted(
    unattached: Puppet, daemon: DaemonProcess
) -> None:
    partition_id = daemon.partition_ids()[-1]
    answers = [unattached.do(touch_new_region), *(unattached.do(LiveVmm.fault, GFN) for _ in range(2))]
    assert answers == [Answer.UNBACKED] * 3
    (line,) = lines_of(daemon, partition_id)
    assert (line["event"], line["vp_index"], line["error"]) == (
        "faults_unbacked",
        0,
        "the VMM has not called attach_memory",
    )
    assert "unattached the VMM had not called attach_memory 3" in told(daemon, "stats", partition_id)
    assert "watch unattached, nothing is mapped before the VMM calls attach_memory: " in told(daemon, "ls")


def test_memory_that_no_userfaultfd_can_watch_is_told_with_the_kernels_refusal(
    watched: Puppet, daemon: DaemonProcess, tmp_path: Path
) -> None:
    partition_id = daemon.partition_ids()[-1]
    (tmp_path / "ram").write_bytes(bytes(PAGES * 4096))
    uaddrs = watched.do(LiveVmm.map_path, tmp_path / "ram", PAGES)
    watched.do(LiveVmm.add_region, GFN, uaddrs)
    assert watched.do(LiveVmm.fault, GFN) is Answer.UNBACKED
    (line,) = lines_of(daemon, partition_id)
    assert (line["event"], "UFFDIO_REGISTER: EINVAL" in line["error"]) == ("faults_unbacked", True)
    shown = told(daemon, "show", partition_id)
    assert "watch userfaultfd: the kernel reports changes of the VMM's memory" in shown
    assert "unwatchable no userfaultfd can watch it: a file on disk, a device 1" in shown


def test_memory_that_the_vmm_has_unmapped_is_counted_and_not_told(
    watched: Puppet, daemon: DaemonProcess
) -> None:
    partition_id = daemon.partition_ids()[-1]
    uaddrs = watched.do(LiveVmm.free_space, PAGES)
    watched.do(LiveVmm.add_region, GFN, uaddrs)
    assert watched.do(LiveVmm.fault, GFN) is Answer.UNBACKED
    assert lines_of(daemon, partition_id) == []
    assert "no_vma nothing is mapped there in the VMM 1" in told(daemon, "stats", partition_id)


# ------------------------------------------------ other users, other pid namespaces


@pytest.fixture(scope="module")
def public_daemon() -> Iterator[DaemonProcess]:
    """In a pid namespace of its own, for any user."""
    directory = Path(tempfile.mkdtemp(prefix="interceptd-"))
    directory.chmod(0o755)
    with DaemonProcess(
        directory,
        config=f"socket_mode = 0o666\nallowed_uids = [0, {USER}]",
        launch=(*IN_ANOTHER_PID_NAMESPACE, sys.executable, "-m", "interceptd"),
        environment=ENVIRONMENT,
    ) as process:
        yield process.wait_serving()
    shutil.rmtree(directory)


@needs_root
@needs_pid_namespaces
def test_a_vmm_in_another_pid_namespace_has_no_pid_and_that_is_said(
    public_daemon: DaemonProcess, start_vmm: StartVmm
) -> None:
    vmm = start_vmm((*IN_ANOTHER_PID_NAMESPACE, "--mount-proc"))
    assert vmm.own_pid == 1
    partition_id = vmm.do(LiveVmm.connect, public_daemon.socket)
    vmm.do(LiveVmm.attach, Watch.REQUIRED, promise=False)
    assert vmm.do(touch_new_region) is Answer.MAPPED
    listed = told(public_daemon, "ls")
    assert f"{partition_id} live 0 - 1" in listed
    assert listed.endswith("pid -: the process is in another pid namespace")
    shown = told(public_daemon, "show", partition_id)
    assert "owner uid 0, pid -: the process is in another pid namespace" in shown
    (created,) = [
        line
        for line in public_daemon.log_lines()
        if line["event"] == "partition_created" and line["partition_id"] == partition_id
    ]
    assert (created["pid"], created["pid_namespace"]) == (0, "another")


@needs_root
@needs_pid_namespaces
def test_an_ordinary_users_memory_is_watched_whatever_the_sysctl_says(
    public_daemon: DaemonProcess, start_vmm: StartVmm
) -> None:
    """vm.unprivileged_userfaultfd = 0 refuses only userfaultfds that also take the kernel's faults."""
    vmm = start_vmm(as_user.launch(USER))
    allowed = int(Path(USERFAULTFD_SYSCTL).read_text())
    assert vmm.do(try_without_user_mode_only) == (0 if allowed else errno.EPERM)
    partition_id = vmm.do(LiveVmm.connect, public_daemon.socket)
    vmm.do(LiveVmm.attach, Watch.IF_POSSIBLE, promise=False)
    assert vmm.do(touch_new_region) is Answer.MAPPED
    eventually(lambda: "watch userfaultfd:" in told(public_daemon, "show", partition_id), True)
    assert lines_of(public_daemon, partition_id) == []
