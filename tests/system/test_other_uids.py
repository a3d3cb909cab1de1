"""Other users: kept out by the socket's mode, by `allowed_uids`, and from each other's partitions."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from fakes.daemon_process import DaemonProcess
from fakes.other_user import as_uid
from fakes.raw_client import RawConnection, Refusal
from fakes.raw_vmm import MODEL, WHOLE_MEMORY, RawVmm
from fakes.witness import Witness

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root can act as another user")

TENANT, STRANGER, OVERFLOW = 61001, 61002, 65534
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


def serve_own_partition(path: Path) -> object:
    with Witness(path) as witness:
        return witness.serve()


def test_a_uid_that_is_not_allowed_is_eacces_that_names_it(daemon: DaemonProcess, witness: Witness) -> None:
    refusal = as_uid(STRANGER, greet, daemon.socket)
    assert (refusal.name, refusal.details) == ("EACCES", {"uid": STRANGER})
    assert ("allowed_uids" in refusal.message, witness.serve()) == (True, Witness.SERVED)


def test_the_overflow_uid_is_refused_as_what_it_is(daemon: DaemonProcess, witness: Witness) -> None:
    refusal = as_uid(OVERFLOW, greet, daemon.socket)
    assert (refusal.name, refusal.details, "overflow" in refusal.message) == (
        "EACCES",
        {"uid": OVERFLOW},
        True,
    )
    assert witness.serve() == Witness.SERVED


@pytest.mark.parametrize("role", ["vp", "notifier", "hypervisor"])
def test_an_allowed_uid_with_the_right_token_of_anothers_partition_is_told_what_a_wrong_token_is(
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
