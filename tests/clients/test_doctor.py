"""`interceptctl doctor`: what is missing, for which mode, and how to fix it."""

from __future__ import annotations

import json
import os
import resource
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from fakes.scripted_daemon import ScriptedDaemon, hello, replies
from fakes.userfaultfd_kernel import EVENT_UNMAP, UserfaultfdKernel
from intercept_client import _userfaultfd as userfaultfd
from intercept_client.memory import Permission, UserfaultfdNotPermitted, UserfaultfdNotSupported
from intercept_protocol.messages import DaemonStatistics
from interceptctl.cli import main
from interceptctl.doctor import command, confinement, kernel, sockets
from interceptctl.doctor.finding import Finding, Mode, State
from interceptd.address_space.process import WORKERS

STATISTICS = DaemonStatistics(
    uptime_ms=90_000, partitions=0, vps=0, connections=1, connections_without_hello=0, tasks=9,
    partitions_created=0, partitions_lost=0, connections_refused=0, intercepts={}, invalidations=0,
)  # fmt: skip
FINE = Finding("kernel thing", Mode.LIVE, State.OK, "is there")
LIMITED = Finding("old kernel", Mode.LIVE, State.LIMITED, "slower", "a newer one")
MISSING = Finding("/dev/kvm", Mode.GUESTS, State.MISSING, "permission denied", "join the group kvm")


def doctor(monkeypatch: pytest.MonkeyPatch, findings: list[Finding], *arguments: str) -> Result:
    monkeypatch.setattr(command, "examine", lambda *_: findings)
    return CliRunner().invoke(main, ["doctor", *arguments])


@pytest.mark.parametrize(("findings", "code"), [([FINE, LIMITED], 0), ([FINE, LIMITED, MISSING], 1)])
def test_the_exit_code_is_1_only_if_something_is_missing(
    monkeypatch: pytest.MonkeyPatch, findings: list[Finding], code: int
) -> None:
    assert doctor(monkeypatch, findings).exit_code == code


def test_a_mode_leaves_out_what_only_later_modes_need(monkeypatch: pytest.MonkeyPatch) -> None:
    result = doctor(monkeypatch, [FINE, MISSING], "--for", "live")
    assert (result.exit_code, "/dev/kvm" in result.stdout) == (0, False)


def test_json_has_every_field_of_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    result = doctor(monkeypatch, [MISSING], "--json")
    assert json.loads(result.stdout) == {
        "findings": [
            {
                "name": "/dev/kvm",
                "mode": "guests",
                "state": "missing",
                "found": "permission denied",
                "fix": "join the group kvm",
            }
        ]
    }


def test_the_table_of_this_machine_fits_80_columns_and_shows_fixes(socket_path: Path) -> None:
    result = CliRunner().invoke(main, ["--socket", str(socket_path), "doctor"])
    assert max(len(line) for line in result.stdout.splitlines()) <= 80
    assert "fix: start interceptd" in result.stdout


def test_an_operator_socket_that_answers_is_ok(socket_path: Path) -> None:
    with ScriptedDaemon(socket_path, ([*hello(), *replies(STATISTICS)],)):
        found = sockets.operator_socket(str(socket_path))
    assert (found.state, found.found) == (State.OK, f"{socket_path} answers, up 1m30s")


def test_an_absent_socket_is_limited_and_another_file_in_its_place_is_missing(tmp_path: Path) -> None:
    path = tmp_path / "operator.sock"
    before = sockets.operator_socket(str(path))
    path.touch()
    after = sockets.operator_socket(str(path))
    assert (before.state, after.state, after.found) == (State.LIMITED, State.MISSING, f"{path}: not a socket")


def test_a_vmm_socket_without_a_listener_is_missing(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as stale:
        stale.bind(str(tmp_path / "vmm.sock"))
    found = sockets.vmm_socket(str(tmp_path / "vmm.sock"))
    assert (found.state, "Connection refused" in found.found) == (State.MISSING, True)


def test_a_vmm_socket_whose_backlog_is_full_is_alive_and_limited(tmp_path: Path) -> None:
    path = str(tmp_path / "vmm.sock")
    with socket.socket(socket.AF_UNIX) as busy, socket.socket(socket.AF_UNIX) as waiting:
        busy.bind(path)
        busy.listen(0)
        waiting.connect(path)
        found = sockets.vmm_socket(path)
    assert (found.state, "queue of pending connections is full" in found.found) == (State.LIMITED, True)


def test_no_access_to_the_operator_socket_is_limited_and_to_the_vmm_socket_is_missing(
    socket_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)  # as for a user who is not root
    with ScriptedDaemon(socket_path, ()):
        operator, vmm = sockets.operator_socket(str(socket_path)), sockets.vmm_socket(str(socket_path))
    assert (operator.state, vmm.state) == (State.LIMITED, State.MISSING)
    assert "no access for this user" in operator.found


def test_the_vmms_socket_may_be_elsewhere(socket_path: Path, tmp_path: Path) -> None:
    elsewhere = str(tmp_path / "vmms" / "vmm.sock")
    arguments = ["--socket", str(socket_path), "doctor", "--json", "--vmm-socket", elsewhere]
    findings = json.loads(CliRunner().invoke(main, arguments).stdout)["findings"]
    assert [item["found"] for item in findings[:2]] == [
        f"{socket_path}: does not exist",
        f"{elsewhere}: does not exist",
    ]


def test_the_vmms_socket_is_where_the_daemons_environment_puts_it(socket_path: Path, tmp_path: Path) -> None:
    """As in the image of a container."""
    elsewhere = str(tmp_path / "vmms" / "vmm.sock")
    environment = {"INTERCEPTCTL_SOCKET": str(socket_path), "INTERCEPTD_SOCKET": elsewhere}
    result = CliRunner().invoke(main, ["doctor", "--json"], env=environment)
    assert json.loads(result.stdout)["findings"][1]["found"] == f"{elsewhere}: does not exist"


def test_a_path_that_is_too_long_for_a_socket_is_missing() -> None:
    found = sockets.operator_socket("/" + "x" * 107)
    assert (found.state, "108 bytes; the path of a socket may have 107" in found.found) == (
        State.MISSING,
        True,
    )


def test_a_kernel_without_procmap_query_is_limited(tmp_path: Path) -> None:
    (tmp_path / "maps").touch()  # a plain file knows the ioctl no better than an old kernel
    found = kernel.procmap_query(str(tmp_path / "maps"))
    assert (found.state, found.fix) == (State.LIMITED, "Linux 6.11 or newer")


@pytest.mark.parametrize(
    ("refusal", "fix"),
    [
        (UserfaultfdNotSupported(38, "no"), "a kernel with CONFIG_USERFAULTFD"),
        (
            UserfaultfdNotPermitted(1, "no", [Permission.SECCOMP, Permission.DEVICE_MODE]),
            "allow userfaultfd in the seccomp profile, or give the VMMs' group "
            f"{userfaultfd.USERFAULTFD_DEVICE}",
        ),
    ],
)
def test_a_userfaultfd_that_cannot_be_created_is_missing_with_every_fix(
    monkeypatch: pytest.MonkeyPatch, refusal: OSError, fix: str
) -> None:
    def refuse() -> int:
        raise refusal

    monkeypatch.setattr(kernel, "open_userfaultfd", refuse)
    found = kernel.userfaultfd()
    assert (found.state, found.fix.startswith(fix)) == (State.MISSING, True)


def test_a_userfaultfd_whose_kernel_cannot_watch_guest_memory_is_missing_by_the_features_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The daemon would refuse it."""
    monkeypatch.setattr(kernel, "open_userfaultfd", lambda: os.open("/dev/null", os.O_RDONLY))
    monkeypatch.setattr("interceptctl.doctor.kernel.fcntl.ioctl", UserfaultfdKernel(EVENT_UNMAP))
    found = kernel.userfaultfd()
    lacking = "the kernel does not support UFFD_FEATURE_PAGEFAULT_FLAG_WP, UFFD_FEATURE_WP_HUGETLBFS_SHMEM"
    assert (found.state, found.found) == (State.MISSING, lacking)


def test_every_permission_has_a_fix() -> None:
    assert set(kernel._FIXES) == set(Permission)


@pytest.mark.parametrize(
    ("probe", "device", "enable"),
    [
        (kernel.kvm, "kvm", "modprobe kvm_intel or kvm_amd"),
        (kernel.userfaultfd_device, "userfaultfd", "Linux 6.1 or newer"),
    ],
)
def test_a_device_is_absent_from_the_kernel_or_only_from_this_dev(
    tmp_path: Path, probe: Callable[..., Finding], device: str, enable: str
) -> None:
    """In a container the kernel and its modules are fine, and another kernel would not help."""
    path, misc = tmp_path / device, tmp_path / "misc"
    misc.write_text(f"200 tun\n232 {device}\n")
    here, nowhere = (probe(str(path), misc=str(each)) for each in (misc, tmp_path / "none"))
    assert here.found.startswith("no such file, though the kernel offers the device")
    assert here.fix == f"in a container: --device {path}"
    assert nowhere.found.startswith("no such device")
    assert nowhere.fix.startswith(enable)
    assert here.state == nowhere.state == (State.MISSING if device == "kvm" else State.LIMITED)


def test_a_userfaultfd_device_shows_its_permissions(tmp_path: Path) -> None:
    device = tmp_path / "userfaultfd"
    device.touch(0o640)
    shown, gone = kernel.userfaultfd_device(str(device)), kernel.userfaultfd_device(str(tmp_path / "no"))
    assert (shown.state, shown.found) == (State.OK, "mode 0640, accessible to this user")
    assert gone.state is State.LIMITED


LIMITS = {
    "partitions_per_uid": 2, "vps_per_partition": 8, "notifiers_per_partition": 3, "vmms_per_uid": 4,
    "connections_without_hello": 5, "operators": 6, "message_bytes": 65536,
}  # fmt: skip


def test_the_descriptors_of_workers_are_two_for_each_that_a_partition_may_have() -> None:
    assert 2 * sum(WORKERS.values()) == kernel.DESCRIPTORS_OF_WORKERS


def test_descriptors_are_enough_if_a_uid_at_all_of_the_daemons_limits_leaves_some(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    needed = 2 * (8 + 3 + 1 + 12) + 4 * 5 + 5 + 6

    def found(hard: int) -> Finding:
        monkeypatch.setattr(resource, "getrlimit", lambda _: (1, hard))
        return kernel.descriptors(LIMITS)

    assert kernel.descriptors_at(LIMITS) == needed
    assert [found(hard).state for hard in (needed, needed - 1, resource.RLIM_INFINITY)] == [
        State.OK,
        State.LIMITED,
        State.OK,
    ]
    assert f"needs {needed}" in found(needed - 1).found
    assert all(way in found(needed - 1).fix for way in ("unit", "container", "pod", "ulimit"))


def test_without_a_daemon_descriptors_for_ten_partitions_are_required(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1, kernel.ENOUGH_DESCRIPTORS - 1))
    assert kernel.descriptors(None).state is State.LIMITED


def test_limits_are_those_that_the_daemon_states_or_none_without_a_daemon(socket_path: Path) -> None:
    with ScriptedDaemon(socket_path, (hello(),)):
        stated = sockets.stated_limits(str(socket_path))
    assert stated == {"message_bytes": 65536}
    assert sockets.stated_limits(f"{socket_path}.none") is None


@pytest.mark.parametrize(("mode", "state"), [(0o755, State.OK), (0o1777, State.OK), (0o777, State.LIMITED)])
def test_a_world_writable_socket_directory_is_limited_unless_sticky(
    tmp_path: Path, mode: int, state: State
) -> None:
    folder = tmp_path / "sockets"
    folder.mkdir()
    folder.chmod(mode)
    found = sockets.directory(str(folder / "vmm.sock"))
    assert (found.state, f"mode {mode:04o}" in found.found) == (state, True)


def test_a_missing_socket_directory_is_limited(tmp_path: Path) -> None:
    assert sockets.directory(str(tmp_path / "none" / "vmm.sock")).state is State.LIMITED


@pytest.mark.parametrize(
    ("uid_map", "state"),
    [
        ("         0          0 4294967295\n", State.OK),
        ("         0     100000      65536\n", State.LIMITED),
        ("0 1000 1\n1 100000 65536\n", State.LIMITED),
        ("", State.LIMITED),
    ],
)
def test_a_user_namespace_that_does_not_map_every_uid_is_limited(
    tmp_path: Path, uid_map: str, state: State
) -> None:
    path = tmp_path / "uid_map"
    path.write_text(uid_map)
    assert confinement.user_namespace(str(path)).state is state


def test_a_pid_namespace_other_than_the_initial_one_is_limited(tmp_path: Path) -> None:
    (tmp_path / "pid").touch()
    assert confinement.pid_namespace(str(tmp_path)).state is State.LIMITED
    assert "unknown" in confinement.pid_namespace(str(tmp_path / "none")).found


@pytest.mark.parametrize("value", ["0\n", "3\n", None])
def test_any_ptrace_scope_is_ok(tmp_path: Path, value: str | None) -> None:
    path = tmp_path / "ptrace_scope"
    if value is not None:
        path.write_text(value)
    assert confinement.ptrace_scope(str(path)).state is State.OK


def test_a_missing_sysctl_is_limited(tmp_path: Path) -> None:
    assert kernel.userfaultfd_sysctl(str(tmp_path / "none")).state is State.LIMITED
