"""Socket activation: a daemon that is passed its sockets serves on them and leaves their files alone."""

from __future__ import annotations

import os
import shutil
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import structlog

from fakes.daemon_process import DaemonProcess
from fakes.eventually import eventually
from fakes.listening_at import is_listening
from fakes.passing_manager import launch
from fakes.raw_vmm import RawVmm
from fakes.witness import Witness
from interceptd.connections.unix_listener import ListenError, listen_unix
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


@pytest.mark.parametrize(("count", "names"), [("1", "vmm:operator"), ("2", "")])
@pytest.mark.parametrize("keeps", [False, True])
def test_names_that_are_not_as_many_as_the_descriptors_are_refused(
    count: str, names: str, keeps: bool
) -> None:
    environment = {"LISTEN_FDS": count, "LISTEN_PID": "7", "LISTEN_FDNAMES": names}
    with pytest.raises(ListenError, match=f"LISTEN_FDNAMES: expected {count} names, got '{names}'"):
        take_passed_sockets(environment, 7, keeps=keeps)


# ------------------------------------------------ what a predecessor stored

BASE = 500
"""Far above what a test opens."""
Pass = Callable[..., PassedSockets]


@pytest.fixture
def pass_all(monkeypatch: pytest.MonkeyPatch) -> Iterator[Pass]:
    """Passes duplicates of sockets under names; closes what was not closed by then."""
    passed: list[int] = []

    def pass_all(*named: tuple[str, socket.socket], keeps: bool = True) -> PassedSockets:
        monkeypatch.setattr("interceptd.systemd.socket_activation.FIRST_DESCRIPTOR", BASE)
        for descriptor, (_, original) in enumerate(named, start=BASE):
            passed.append(os.dup2(original.fileno(), descriptor, inheritable=True))
        names = ":".join(name for name, _ in named)
        environment = {"LISTEN_FDS": str(len(named)), "LISTEN_PID": "7", "LISTEN_FDNAMES": names}
        return take_passed_sockets(environment, 7, keeps=keeps)

    yield pass_all
    for descriptor in passed:
        with suppress(OSError):
            os.close(descriptor)


@pytest.fixture
def listener(tmp_path: Path) -> Iterator[socket.socket]:
    with listen_unix(str(tmp_path / "vmm.sock"), 0o600) as listener:
        yield listener


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield ours, theirs


def detached(passed: PassedSockets) -> list[int | None]:
    """The listeners' descriptors; the fixture closes them."""
    listeners = (passed.vmm, passed.operator, passed.own_vmm, passed.own_operator)
    return [None if listener is None else listener.detach() for listener in listeners]


@pytest.mark.parametrize("keeps", [False, True])
def test_what_was_stored_is_taken_by_name_and_in_order_and_no_child_inherits_it(
    pass_all: Pass, listener: socket.socket, pair: tuple[socket.socket, socket.socket], keeps: bool
) -> None:
    ours, theirs = pair
    passed = pass_all(
        *(("vmm", listener), ("c1z", ours), ("d", ours), ("own-operator", listener), ("p1z", ours)),
        *(("m1z", ours), ("c1z", theirs), ("m1z", theirs)),
        keeps=keeps,
    )
    assert passed.kept == (
        *(("c1z", BASE + 1), ("d", BASE + 2), ("p1z", BASE + 4), ("m1z", BASE + 5)),
        *(("c1z", BASE + 6), ("m1z", BASE + 7)),
    )
    assert detached(passed) == [BASE, None, None, BASE + 3]
    assert passed.unused == ()
    assert [os.get_inheritable(BASE + number) for number in range(8)] == [False] * 8


@pytest.mark.parametrize(
    ("names", "complaint"),
    [
        (["other"], "expected vmm, operator or both, got 'other'"),
        (["c"], "expected vmm, operator or both, got 'c'"),
        (["d1"], "expected vmm, operator or both, got 'd1'"),
        (["d", "d"], "expected each name once, got 'd' again"),
        (["p1", "p1"], "expected each name once, got 'p1' again"),
        (["vmm"], r"passed descriptor 500 \(vmm\): expected a listening Unix stream socket"),
        (["own-vmm"], r"passed descriptor 500 \(own-vmm\): expected a listening Unix stream socket"),
    ],
)
def test_what_does_not_fit_is_refused_or_closed_and_logged_by_a_daemon_that_keeps(
    names: list[str], complaint: str, pass_all: Pass, pair: tuple[socket.socket, socket.socket]
) -> None:
    ours, theirs = pair
    named = [(name, ours) for name in names]
    with pytest.raises(ListenError, match=complaint):
        pass_all(*named, keeps=False)
    with structlog.testing.capture_logs() as logged:
        passed = pass_all(*named, ("m1", theirs))
    closed = BASE + len(names) - 1
    assert passed.unused == (names[-1],)
    assert [kept.descriptor for kept in passed.kept] == [*range(BASE, closed), closed + 1]
    assert [(line["event"], line["name"]) for line in logged] == [("passed_descriptor_not_used", names[-1])]
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(closed)
    assert (
        theirs.recv(1, socket.MSG_DONTWAIT) == b""
    )  # although `ours` is still open: a store's duplicate would be


def test_a_listener_that_is_passed_twice_is_closed_once_and_goes_on_listening(
    pass_all: Pass, listener: socket.socket
) -> None:
    passed = pass_all(("vmm", listener), ("vmm", listener))
    assert (detached(passed), passed.unused) == ([BASE, None, None, None], ("vmm",))
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
        assert client.connect_ex(listener.getsockname().removesuffix("~")) == 0


def test_a_descriptor_that_is_not_there_is_refused_or_logged(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("interceptd.systemd.socket_activation.FIRST_DESCRIPTOR", BASE)
    for name in ("m1", "vmm"):
        environment = {"LISTEN_FDS": "1", "LISTEN_PID": "7", "LISTEN_FDNAMES": name}
        with pytest.raises(ListenError, match="Bad file descriptor"):
            take_passed_sockets(dict(environment), 7)
        assert take_passed_sockets(environment, 7, keeps=True).unused == (name,)
