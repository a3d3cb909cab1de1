"""Socket activation: a daemon that is passed its sockets serves on them and leaves their files alone."""

from __future__ import annotations

import os
import shutil
import socket
import sys
from pathlib import Path

import pytest

from fakes.daemon_process import DaemonProcess
from fakes.eventually import eventually
from fakes.listening_at import is_listening
from fakes.passing_manager import launch
from fakes.raw_vmm import RawVmm
from fakes.witness import Witness
from interceptd.connections.unix_listener import ListenError
from interceptd.systemd.socket_activation import PassedSockets, take_passed_sockets

ACTIVATE = shutil.which("systemd-socket-activate")


def test_a_daemon_serves_on_both_passed_sockets_and_leaves_their_files(tmp_path: Path) -> None:
    vmm, operator = tmp_path / "vmm.sock", tmp_path / "operator.sock"
    with DaemonProcess(tmp_path, launch=launch(operator=operator, vmm=vmm)) as daemon:
        daemon.wait_serving()
        with Witness(vmm) as witness:
            assert witness.serve() == Witness.SERVED
        assert daemon.stop() == 0
        started = next(line for line in daemon.log_lines() if line["event"] == "daemon_started")
    assert (started["socket"], started["operator_socket"]) == (str(vmm), str(operator))
    assert [path.is_socket() for path in (vmm, operator)] == [True, True]


def test_a_socket_that_is_not_passed_is_bound_and_unlinked(tmp_path: Path) -> None:
    passed, operator = tmp_path / "elsewhere.sock", tmp_path / "operator.sock"
    with DaemonProcess(tmp_path, launch=launch(vmm=passed)) as daemon:
        daemon.wait_serving()
        assert [(tmp_path / "vmm.sock").exists(), operator.exists()] == [False, True]
        with RawVmm(passed):
            assert len(daemon.partition_ids()) == 1
        assert daemon.stop() == 0
    assert [passed.exists(), operator.exists()] == [True, False]


@pytest.mark.skipif(ACTIVATE is None, reason="needs systemd-socket-activate, of Debian's systemd package")
def test_systemd_socket_activate_starts_the_daemon_on_the_first_connection(tmp_path: Path) -> None:
    path = tmp_path / "vmm.sock"
    activate = [str(ACTIVATE), f"--listen={path}", "--fdname=vmm", sys.executable, "-m", "interceptd"]
    with DaemonProcess(tmp_path, launch=activate) as daemon:
        eventually(lambda: is_listening(path), True)
        assert not daemon.operator_socket.exists()
        with Witness(path) as witness:
            assert witness.serve() == Witness.SERVED
        assert daemon.stop() == 0
    assert path.exists()


def test_sockets_for_another_process_are_not_ours() -> None:
    environment = {"LISTEN_FDS": "1", "LISTEN_PID": "1", "LISTEN_FDNAMES": "vmm"}
    assert take_passed_sockets(environment, os.getpid()) == PassedSockets()
    assert environment == {}


@pytest.mark.parametrize(
    ("count", "names"), [("1", "other"), ("1", "vmm:operator"), ("2", ""), ("2", "vmm:vmm")]
)
def test_names_that_do_not_fit_are_refused_and_shown(count: str, names: str) -> None:
    environment = {"LISTEN_FDS": count, "LISTEN_PID": "7", "LISTEN_FDNAMES": names}
    with pytest.raises(ListenError, match=f"LISTEN_FDNAMES: expected .*, got '{names}'"):
        take_passed_sockets(environment, 7)


def test_a_socket_that_does_not_listen_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ours, theirs = socket.socketpair()
    with theirs:
        monkeypatch.setattr("interceptd.systemd.socket_activation.FIRST_DESCRIPTOR", ours.detach())
        environment = {"LISTEN_FDS": "1", "LISTEN_PID": "7", "LISTEN_FDNAMES": "vmm"}
        with pytest.raises(ListenError, match=r"\(vmm\): expected a listening Unix stream socket"):
            take_passed_sockets(environment, 7)
