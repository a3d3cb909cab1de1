"""The sockets as files: one live daemon per path, stale ones replaced, no other user let in for a moment."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from fakes.daemon_process import DaemonProcess, StartDaemon, run_to_end
from fakes.eventually import eventually
from fakes.locked_directory import is_waiting_for_a_lock, locked
from fakes.raw_client import RawConnection
from fakes.watched_directory import WatchedDirectory
from fakes.witness import Witness


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def inode_of(path: Path) -> int:
    return path.stat().st_ino


def test_a_path_that_a_live_daemon_uses_is_an_error_and_the_daemon_continues(
    start_daemon: StartDaemon,
) -> None:
    daemon = start_daemon()
    with Witness(daemon.socket) as witness:
        before = inode_of(daemon.socket)
        ended = run_to_end("--socket", str(daemon.socket))
        assert (ended.returncode, ended.stderr) == (
            1,
            f"Error: {daemon.socket}: is in use by a live daemon\n",
        )
        assert (witness.serve(), inode_of(daemon.socket)) == (Witness.SERVED, before)
    with Witness(daemon.socket) as witness:
        assert witness.serve() == Witness.SERVED


def test_an_operators_path_in_use_is_an_error_that_leaves_no_socket_of_the_loser(
    start_daemon: StartDaemon, tmp_path: Path
) -> None:
    daemon = start_daemon()
    other = tmp_path / "other.sock"
    ended = run_to_end("--socket", str(other), "--operator-socket", str(daemon.operator_socket))
    assert (ended.returncode, f"{daemon.operator_socket}: is in use" in ended.stderr) == (1, True)
    assert (other.exists(), daemon.partition_ids()) == (False, [])


def test_one_path_for_both_sockets_is_an_error(tmp_path: Path) -> None:
    path = str(tmp_path / "one.sock")
    ended = run_to_end("--socket", path, "--operator-socket", path)
    assert (ended.returncode, path in ended.stderr, os.listdir(tmp_path)) == (1, True, [])


def test_a_daemon_that_was_killed_is_replaced_on_its_stale_sockets(start_daemon: StartDaemon) -> None:
    daemon = start_daemon()
    with Witness(daemon.socket) as witness:
        daemon.signal(signal.SIGKILL)
        assert daemon.wait_ended() == -signal.SIGKILL
        assert [peer.receive_all() for peer in (witness.connection, witness.first_vp)] == [[], []]
    assert daemon.socket.exists()
    with Witness(start_daemon().socket) as witness:
        assert witness.serve() == Witness.SERVED


def test_of_two_daemons_that_start_at_once_one_serves_and_the_other_says_why_not(tmp_path: Path) -> None:
    with DaemonProcess(tmp_path) as stale:
        stale.wait_serving().signal(signal.SIGKILL)
        stale.wait_ended()
    with locked(tmp_path):
        one, other = DaemonProcess(tmp_path), DaemonProcess(tmp_path)
        eventually(lambda: all(is_waiting_for_a_lock(pid, tmp_path) for pid in (one.pid, other.pid)), True)
    with one, other:
        eventually(lambda: sorted([str(one.status), str(other.status)]), ["1", "None"])
        assert "is in use by a live daemon" in one.log_text()
        with Witness(one.socket) as witness:
            assert witness.serve() == Witness.SERVED


@pytest.mark.parametrize("name", ["vmm.sock", "operator.sock"])
def test_a_file_that_is_not_a_socket_is_an_error_and_stays(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("precious")
    ended = run_to_end("--socket", str(tmp_path / "vmm.sock"))
    assert (ended.returncode, f"{tmp_path / name}: exists and is not a socket" in ended.stderr) == (1, True)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {name: "precious"}


def test_an_empty_path_is_an_error() -> None:
    ended = run_to_end("--socket", "")
    assert (ended.returncode, ended.stderr) == (
        1,
        "Error: --socket: socket: expected the path of a socket, got ''\n",
    )


def test_a_path_with_a_nul_is_an_error_that_names_it(tmp_path: Path) -> None:
    file = tmp_path / "interceptd.toml"
    file.write_text('socket = "a\\u0000b"')
    ended = run_to_end("--config", str(file))
    assert (ended.returncode, ended.stderr) == (
        1,
        f"Error: {file}: socket: expected the path of a socket, got 'a\\x00b'\n",
    )


def test_a_path_that_is_a_directory_is_an_error_that_names_it(tmp_path: Path) -> None:
    ended = run_to_end("--socket", str(tmp_path))
    assert (ended.returncode, ended.stderr) == (1, f"Error: {tmp_path}: exists and is not a socket\n")


def test_a_path_as_long_as_an_address_can_hold_is_served_and_a_longer_one_names_both_lengths() -> None:
    with tempfile.TemporaryDirectory(prefix="interceptd-") as directory:
        path = f"{directory}/".ljust(107, "x")
        ended = run_to_end("--socket", f"{path}x", "--operator-socket", f"{directory}/o")
        assert (ended.returncode, ended.stderr) == (
            1,
            f"Error: {path}x: is 108 bytes long; a socket path may have 107\n",
        )
        command = [sys.executable, "-m", "interceptd", "serve", "--socket", path]
        with subprocess.Popen(
            [*command, "--operator-socket", f"{directory}/o"], stderr=subprocess.DEVNULL
        ) as one:
            eventually(Path(path).exists, True)
            one.terminate()
        assert (one.returncode, os.listdir(directory)) == (0, [])


def test_a_directory_that_is_not_there_is_an_error_that_names_it(tmp_path: Path) -> None:
    ended = run_to_end("--socket", str(tmp_path / "missing" / "vmm.sock"))
    assert (ended.returncode, ended.stderr) == (
        1,
        f"Error: {tmp_path / 'missing'}: the directory for the socket does not exist\n",
    )


def test_the_operators_socket_has_mode_0600_from_its_first_moment(tmp_path: Path) -> None:
    with WatchedDirectory(tmp_path) as directory, DaemonProcess(tmp_path, umask=0) as daemon:
        daemon.wait_serving()
        (tmp_path / "end").touch()
        changed = [happening.name for happening in directory.wait_for("end") if not happening.appeared]
        assert (mode_of(daemon.operator_socket), changed) == (0o600, [])


@pytest.mark.parametrize(("config", "mode"), [("", 0o660), ("socket_mode = 0o600", 0o600)])
def test_the_vmms_socket_has_the_configured_mode_whatever_the_umask(
    start_daemon: StartDaemon, config: str, mode: int
) -> None:
    daemon = start_daemon(config=config, umask=0o777)
    assert (mode_of(daemon.socket), mode_of(daemon.operator_socket)) == (mode, 0o600)


def test_a_daemon_that_ends_leaves_the_sockets_of_its_successor(start_daemon: StartDaemon) -> None:
    daemon = start_daemon()
    daemon.socket.unlink()
    daemon.operator_socket.unlink()
    with Witness(start_daemon().socket) as witness:
        assert daemon.stop() == 0
        assert witness.serve() == Witness.SERVED
    with RawConnection(daemon.socket) as connection:
        assert connection.say_hello("vmm")["server"] == "interceptd"
