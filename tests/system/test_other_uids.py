"""Other users: kept out by the socket's mode, by `allowed_uids`, and from each other's partitions."""

from __future__ import annotations

import codecs
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from fakes import as_user
from fakes.daemon_process import DaemonProcess
from fakes.eventually import PATIENCE
from fakes.other_user import as_uid
from fakes.puppet import ENVIRONMENT
from fakes.raw_client import RawConnection, Refusal, request
from fakes.raw_vmm import MODEL, WHOLE_MEMORY, RawVmm
from fakes.witness import Witness
from interceptctl.cli import main
from interceptctl.exercise import program, summary
from interceptctl.guest import program as guest_program
from interceptctl.guest import summary as guest_summary
from interceptd.connections.unix_listener import ListenError, listen_unix

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root can act as another user")

TENANT, STRANGER, OVERFLOW, GROUP = 61001, 61002, 65534, 61100
OPEN_TO_ALL = f"""
socket_mode = 0o666
allowed_uids = [0, {TENANT}]
limits.partitions_per_uid = 2
"""


@pytest.fixture(scope="module")
def public_directory() -> Iterator[Path]:
    """A directory that other users may enter; the test's own one is not."""
    directory = Path(tempfile.mkdtemp(prefix="interceptd-"))
    directory.chmod(0o755)
    yield directory
    shutil.rmtree(directory)


@pytest.fixture(scope="module")
def open_daemon(public_directory: Path) -> Iterator[DaemonProcess]:
    with DaemonProcess(public_directory, config=OPEN_TO_ALL) as process:
        yield process.wait_serving()


@pytest.fixture(scope="module")
def grouped_daemon(public_directory: Path) -> Iterator[DaemonProcess]:
    directory = public_directory / "grouped"
    directory.mkdir(0o755)
    with DaemonProcess(directory, config=f"socket_mode = 0o666\nallowed_gids = [{GROUP}]") as process:
        yield process.wait_serving()


@pytest.fixture
def daemon(open_daemon: DaemonProcess) -> DaemonProcess:
    return open_daemon


def greet(path: Path) -> Refusal:
    with RawConnection(path) as connection:
        return connection.farewell()


def join(path: Path, hello: dict[str, object]) -> Refusal:
    with RawConnection(path) as connection:
        return connection.refusal("hello", hello)


def fill_up(path: Path) -> Refusal:
    with RawVmm(path), RawVmm(path), RawConnection(path) as connection:
        connection.say_hello("vmm")
        return connection.refusal("create_partition", MODEL)


def ask_as_vmm(path: Path, method: str, fields: dict[str, object]) -> Refusal:
    with RawVmm(path) as vmm:
        return vmm.connection.refusal(method, fields)


def create_partition_over(inherited: int) -> None:
    with socket.socket(fileno=os.dup(inherited)) as given:
        given.setblocking(True)
        for method, fields in (("hello", {"protocol": 1, "role": "vmm"}), ("create_partition", MODEL)):
            given.sendall(request(method, fields))
            assert given.recv(4096)


def exhaust_the_pace(path: Path) -> int:
    """More than a burst."""
    with RawVmm(path) as vmm:
        return sum(vmm.ask("kick", vp_index="all") is None for _ in range(1500))


_LOADED = program, summary, guest_program, guest_summary, codecs.lookup("ascii")
"""What the tool loads when it needs it: here that is before we become a user who may not read it."""


def helps(group: click.Group, *above: str) -> Iterator[tuple[str, ...]]:
    """Every command that prints a help, the group itself too."""
    yield *above, "--help"
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from helps(command, *above, name)
        else:
            yield *above, name, "--help"


HELPS = [*helps(main)]


def told(*arguments: str | Path) -> tuple[int, str]:
    """The tool's exit code, and all that it prints."""
    result = CliRunner().invoke(main, [*map(str, arguments)])
    return result.exit_code, result.stdout + result.stderr


def serve_own_partition(path: Path) -> object:
    with Witness(path) as witness:
        return witness.serve()


def test_a_uid_that_is_not_allowed_is_eacces_that_names_it(daemon: DaemonProcess, witness: Witness) -> None:
    refusal = as_uid(STRANGER, greet, daemon.socket)
    assert (refusal.name, refusal.details) == ("EACCES", {"uid": STRANGER})
    assert ("allowed_uids" in refusal.message, witness.serve()) == (True, Witness.SERVED)


def test_the_overflow_uid_is_refused_by_that_name(daemon: DaemonProcess, witness: Witness) -> None:
    refusal = as_uid(OVERFLOW, greet, daemon.socket)
    assert (refusal.name, refusal.details, "overflow" in refusal.message) == (
        "EACCES",
        {"uid": OVERFLOW},
        True,
    )
    assert witness.serve() == Witness.SERVED


@pytest.mark.parametrize("role", ["vp", "notifier", "hypervisor"])
def test_the_right_token_of_another_uids_partition_is_refused_like_a_wrong_token(
    daemon: DaemonProcess, vmm: RawVmm, role: str
) -> None:
    vp_index: dict[str, dict[str, object]] = {"vp": {"vp_index": 0}}
    hello = {"protocol": 1, "role": role, **vp_index.get(role, {}), **vmm.credentials}
    right_token = as_uid(TENANT, join, daemon.socket, hello)
    wrong_token = as_uid(TENANT, join, daemon.socket, hello | {"token": bytes(16)})
    assert (right_token.name, right_token) == ("EACCES", wrong_token)


def test_an_allowed_uid_is_served_in_a_partition_of_its_own(daemon: DaemonProcess, witness: Witness) -> None:
    assert as_uid(TENANT, serve_own_partition, daemon.socket) == Witness.SERVED
    assert witness.serve() == Witness.SERVED


def test_the_partitions_of_one_uid_leave_those_of_another_alone(daemon: DaemonProcess, vmm: RawVmm) -> None:
    assert vmm.notifier().ask("invalidate", WHOLE_MEMORY) is None  # root has its two: the witness and this
    refusal = as_uid(TENANT, fill_up, daemon.socket)
    assert (refusal.name, str(TENANT) in refusal.message) == ("ENOSPC", True)


@pytest.mark.parametrize("groups", [(GROUP, ()), (STRANGER, (GROUP,))], ids=["primary", "supplementary"])
def test_a_member_of_an_allowed_group_is_served_in_a_partition_of_its_own(
    grouped_daemon: DaemonProcess, groups: tuple[int, tuple[int, ...]]
) -> None:
    served = as_uid(STRANGER, serve_own_partition, grouped_daemon.socket, gid=groups[0], groups=groups[1])
    assert served == Witness.SERVED


def test_a_user_in_no_allowed_group_is_eacces_with_that_reason(grouped_daemon: DaemonProcess) -> None:
    refusal = as_uid(STRANGER, greet, grouped_daemon.socket, groups=(GROUP + 1,))
    assert (refusal.name, "and none of its groups in allowed_gids" in refusal.message) == ("EACCES", True)


def test_an_allowed_group_does_not_let_the_overflow_uid_in(grouped_daemon: DaemonProcess) -> None:
    refusal = as_uid(OVERFLOW, greet, grouped_daemon.socket, groups=(GROUP,))
    assert (refusal.name, "overflow" in refusal.message) == ("EACCES", True)


def test_the_vmms_socket_is_given_to_the_configured_group_and_opens_for_its_members(
    public_directory: Path,
) -> None:
    directory = public_directory / "group"
    directory.mkdir(0o755)
    config = f'socket_group = "{GROUP}"\nallowed_uids = [0, {TENANT}]'
    with DaemonProcess(directory, config=config) as daemon:
        daemon.wait_serving()
        assert (daemon.socket.stat().st_gid, daemon.operator_socket.stat().st_gid) == (GROUP, os.getegid())
        assert as_uid(TENANT, serve_own_partition, daemon.socket, groups=(GROUP,)) == Witness.SERVED
        with pytest.raises(PermissionError):
            as_uid(TENANT, greet, daemon.socket)


def test_a_group_that_the_daemons_user_is_not_in_is_an_error_that_names_the_key(
    public_directory: Path,
) -> None:
    directory = public_directory / "denied"
    directory.mkdir()
    directory.chmod(0o777)
    command = (*as_user.launch(TENANT), sys.executable, "-m", "interceptd")
    with DaemonProcess(
        directory, config=f'socket_group = "{GROUP}"', launch=command, environment=ENVIRONMENT
    ) as daemon:
        assert daemon.wait_ended() == 1
        assert f"socket_group: cannot change the group to '{GROUP}'" in daemon.log_text()
    assert sorted(path.name for path in directory.iterdir()) == ["interceptd.toml", "log"]


@pytest.mark.parametrize("method", ["list_partitions", "inspect_partition", "drain", "set_policy"])
def test_a_tenant_cannot_query_anothers_partition(daemon: DaemonProcess, vmm: RawVmm, method: str) -> None:
    refusal = as_uid(TENANT, ask_as_vmm, daemon.socket, method, {"partition_id": vmm.partition_id})
    assert refusal.name in {"ENOSYS", "EINVAL"}  # no such method, or none with that field


def test_a_tenant_cannot_be_an_operator_on_the_vmm_socket(daemon: DaemonProcess, vmm: RawVmm) -> None:
    refusal = as_uid(TENANT, join, daemon.socket, {"protocol": 1, "role": "operator"})
    assert (refusal.name, vmm.ask("statistics")["vps"]) == ("EACCES", 0)


def test_a_connection_that_another_uids_process_was_given_is_its_creators(
    daemon: DaemonProcess, witness: Witness
) -> None:
    """SO_PEERCRED is that of connect(2): the process that holds the socket acts for the uid that made it."""
    with RawConnection(daemon.socket) as given:
        as_uid(TENANT, create_partition_over, given.fileno())
        partitions = daemon.operator().ask("list_partitions")["partitions"]
        assert [each["uid"] for each in partitions] == [0, 0]
    assert witness.serve() == Witness.SERVED


def test_a_tenant_at_its_rate_limit_delays_no_other(daemon: DaemonProcess, witness: Witness) -> None:
    took = as_uid(TENANT, exhaust_the_pace, daemon.socket)
    assert witness.serve() == Witness.SERVED
    assert took == 1500


def test_the_operators_socket_is_its_owners_alone(daemon: DaemonProcess) -> None:
    with pytest.raises(PermissionError):
        as_uid(TENANT, greet, daemon.operator_socket)


def test_the_default_mode_keeps_other_users_from_the_vmms_socket(public_directory: Path) -> None:
    directory = public_directory / "default"
    directory.mkdir(0o755)
    with DaemonProcess(directory) as daemon:
        daemon.wait_serving()
        with pytest.raises(PermissionError):
            as_uid(TENANT, greet, daemon.socket)


def test_the_overflow_uid_is_served_where_it_is_configured(public_directory: Path) -> None:
    directory = public_directory / "overflow"
    directory.mkdir(0o755)
    config = f"socket_mode = 0o666\nallowed_uids = [0, {OVERFLOW}]"
    with DaemonProcess(directory, config=config) as daemon:
        daemon.wait_serving()
        assert as_uid(OVERFLOW, serve_own_partition, daemon.socket) == Witness.SERVED


# ------------------------------------------------ a socket that another user left behind


def refused_to_listen(path: Path) -> str:
    """The error that a user who starts a second daemon gets."""
    with pytest.raises(ListenError) as refused, listen_unix(str(path), 0o600):
        pass
    return str(refused.value)


@pytest.fixture
def left_behind(public_directory: Path) -> Iterator[Path]:
    """A stale socket of root in a world-writable directory."""
    directory = public_directory / "sticky"
    directory.mkdir()
    directory.chmod(0o1777)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as dead:
        dead.bind(str(directory / "d.sock"))
    yield directory / "d.sock"
    shutil.rmtree(directory)


def test_an_inaccessible_socket_is_reported_with_its_owner(left_behind: Path) -> None:
    left_behind.chmod(0o600)
    assert as_uid(TENANT, refused_to_listen, left_behind) == (
        f"{left_behind}: cannot tell whether a daemon listens there: Permission denied; "
        "the socket belongs to uid 0: remove it if it is stale"
    )
    assert left_behind.is_socket()


def test_a_dead_socket_that_cannot_be_removed_is_reported_with_its_owner(
    left_behind: Path,
) -> None:
    left_behind.chmod(0o666)
    assert as_uid(TENANT, refused_to_listen, left_behind) == (
        f"{left_behind}: is stale, but cannot be replaced: Operation not permitted; "
        "the socket belongs to uid 0, who can remove it"
    )
    assert os.listdir(left_behind.parent) == [left_behind.name]


@pytest.fixture(scope="module")
def closed_daemon(public_directory: Path) -> Iterator[DaemonProcess]:
    """Root's, with the default modes."""
    directory = public_directory / "closed"
    directory.mkdir(0o755)
    with DaemonProcess(directory) as process:
        yield process.wait_serving()


@pytest.mark.parametrize("command", [("ls",), ("show", "1"), ("watch",), ("top", "--once"), ("health",)])
def test_a_user_other_than_the_operator_gets_status_3_with_that_reason(
    closed_daemon: DaemonProcess, command: tuple[str, ...]
) -> None:
    status, said = as_uid(STRANGER, told, "--socket", closed_daemon.operator_socket, *command)
    assert (status, "permission denied; only the owner of the operator socket may connect" in said) == (
        3,
        True,
    )


def test_a_user_without_access_to_the_vmm_socket_gets_status_3_with_that_reason(
    closed_daemon: DaemonProcess,
) -> None:
    status, said = as_uid(STRANGER, told, "exercise", "--quiet", "--vmm-socket", closed_daemon.socket)
    assert (status, "permission denied; see socket_mode and socket_group" in said) == (3, True)


def test_a_guest_of_a_user_without_access_fails_with_that_reason_or_without_kvm(
    closed_daemon: DaemonProcess,
) -> None:
    status, said = as_uid(STRANGER, told, "guest", "--quiet", "--vmm-socket", closed_daemon.socket)
    assert (status in (3, 4), "permission denied" in said.lower() or "cannot run guests" in said) == (
        True,
        True,
    )


def helped(path: Path) -> dict[tuple[str, ...], tuple[int, str]]:
    """Each command's exit code and the start of what it prints, where the operator's socket is named."""
    return {words: (status, said[:6]) for words in HELPS for status, said in [told("--socket", path, *words)]}


def test_no_help_needs_a_right_to_the_operators_socket(closed_daemon: DaemonProcess) -> None:
    assert as_uid(STRANGER, helped, closed_daemon.operator_socket) == dict.fromkeys(HELPS, (0, "Usage:"))
    hidden = closed_daemon.socket.parent / "hidden"
    hidden.mkdir(0o700)
    assert as_uid(STRANGER, helped, hidden / "operator.sock") == dict.fromkeys(HELPS, (0, "Usage:"))


@pytest.mark.parametrize(
    "command",
    [("stats",), ("policy", "show", "1"), ("policy", "set", "1", "--mmio-granularity", "page"), ("restart",),
     ("drain", "--timeout", "1")],
    ids=" ".join,
)  # fmt: skip
def test_a_socket_in_a_directory_that_is_closed_to_a_user_is_status_3_with_that_reason(
    closed_daemon: DaemonProcess, tmp_path: Path, command: tuple[str, ...]
) -> None:
    status, said = as_uid(STRANGER, told, "--socket", tmp_path / "operator.sock", *command)
    assert (status, "permission denied; only the owner of the operator socket may connect" in said) == (
        3,
        True,
    )
    assert closed_daemon.status is None


def test_the_doctor_of_a_vmms_user_needs_no_operators_socket(daemon: DaemonProcess) -> None:
    arguments = ("--socket", daemon.operator_socket, "doctor", "--for", "model", "--json")
    status, said = as_uid(TENANT, told, *arguments, "--vmm-socket", daemon.socket)
    operator, vmm, *_ = json.loads(said)["findings"]
    assert (status, operator["state"], vmm["state"]) == (0, "limited", "ok")
    assert "none for VMMs, which do not need it" in operator["fix"]
    assert vmm["found"] == f"{daemon.socket} accepts this user's VMMs, mode 0666"


def test_the_doctor_of_a_user_who_is_not_allowed_says_so(daemon: DaemonProcess) -> None:
    """The socket's mode lets everybody connect, and the daemon does not."""
    arguments = ("--socket", daemon.operator_socket, "doctor", "--for", "model", "--json")
    status, said = as_uid(STRANGER, told, *arguments)
    vmm = json.loads(said)["findings"][1]
    assert (status, vmm["state"], f"uid {STRANGER} is not in allowed_uids" in vmm["found"]) == (
        1,
        "missing",
        True,
    )
    assert vmm["fix"].startswith("allowed_uids or allowed_gids")


def test_the_doctor_says_which_sockets_a_user_may_not_use(closed_daemon: DaemonProcess) -> None:
    status, said = as_uid(STRANGER, told, "--socket", closed_daemon.operator_socket, "doctor", "--json")
    sockets = [finding["found"] for finding in json.loads(said)["findings"][:2]]
    assert (status, ["no access for this user" in found for found in sockets]) == (1, [True, True])


def test_a_program_that_the_other_user_cannot_read_is_run_as_that_user(tmp_path: Path) -> None:
    """So are these tests where the project was cloned into a directory of root's alone."""
    (tmp_path / "hermit").mkdir(0o700)
    (tmp_path / "hermit" / "__main__.py").write_text("import os, sys; print(os.getuid(), sys.argv[1:])")
    environment = os.environ | ENVIRONMENT | {"PYTHONPATH": f"{ENVIRONMENT['PYTHONPATH']}:{tmp_path}"}
    command = [*as_user.launch(TENANT), sys.executable, "-m", "hermit", "alone"]
    said = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=PATIENCE, check=True
    )
    assert said.stdout == f"{TENANT} ['alone']\n"
