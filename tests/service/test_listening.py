"""Binding a Unix socket, and who is at the other end."""

from __future__ import annotations

import os
import socket
import stat
from pathlib import Path

import pytest

from intercept_protocol.errors import WireError
from interceptd.listening import BACKLOG, ListenError, listening
from interceptd.peer import Peer, overflow_uid, require_allowed


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "d.sock")


def connect(path: str) -> socket.socket:
    client = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    client.connect(path)
    return client


def leave_stale(path: str) -> None:
    """The file of a daemon that died."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as dead:
        dead.bind(path)


def test_a_stale_socket_is_replaced(path: str) -> None:
    leave_stale(path)
    with listening(path, 0o600) as listener, connect(path) as client:
        assert client.getpeername() == listener.getsockname()


def test_a_live_socket_is_refused_and_stays(path: str) -> None:
    with listening(path, 0o600):
        with pytest.raises(ListenError, match="is in use by a live daemon"), listening(path, 0o600):
            pass
        connect(path).close()


def test_a_live_socket_with_a_full_backlog_is_still_live(path: str) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as busy:
        busy.bind(path)
        busy.listen(0)
        with connect(path), pytest.raises(ListenError, match="is in use"), listening(path, 0o600):
            pass


def test_a_file_that_is_no_socket_is_refused_and_stays(path: str) -> None:
    Path(path).write_text("precious")
    with pytest.raises(ListenError, match="exists and is not a socket"), listening(path, 0o600):
        pass
    assert Path(path).read_text() == "precious"


def test_a_missing_directory_is_named_with_the_cause(tmp_path: Path) -> None:
    missing = str(tmp_path / "none" / "d.sock")
    with pytest.raises(ListenError, match=f"{missing}: No such file"), listening(missing, 0o600):
        pass


@pytest.mark.parametrize("mode", [0o600, 0o660, 0o666])
def test_the_socket_has_its_mode_and_the_process_its_umask(path: str, mode: int) -> None:
    before = os.umask(0o022)
    try:
        with listening(path, mode):
            assert stat.S_IMODE(os.stat(path).st_mode) == mode
        assert os.umask(0o022) == 0o022
    finally:
        os.umask(before)


def test_the_socket_file_is_gone_afterwards(path: str) -> None:
    with listening(path, 0o600):
        pass
    assert not os.path.exists(path)


def test_the_socket_file_of_another_daemon_stays_when_we_end(path: str) -> None:
    with listening(path, 0o600):
        os.unlink(path)
        leave_stale(path)
    assert os.path.exists(path)


def test_the_backlog_takes_a_burst_of_vps(path: str) -> None:
    assert BACKLOG >= 512
    with listening(path, 0o600):
        burst = [connect(path) for _ in range(300)]
        for client in burst:
            client.close()


# ------------------------------------------------ peers


def test_a_peer_is_read_from_the_kernel() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        assert Peer.of(ours) == Peer(os.getpid(), os.geteuid(), os.getegid())


def test_a_uid_that_is_not_named_is_eacces_and_named_and_the_others_are_allowed() -> None:
    require_allowed(Peer(1, 1000, 1000), {0, 1000})
    with pytest.raises(WireError, match="EACCES: uid 1001 is not among allowed_uids") as refused:
        require_allowed(Peer(1, 1001, 1000), {0, 1000})
    assert refused.value.details == {"uid": 1001}


def test_the_overflow_uid_is_refused_with_a_hint_unless_named() -> None:
    stranger = Peer(1, overflow_uid(), 65534)
    with pytest.raises(WireError, match="the overflow uid"):
        require_allowed(stranger, {0})
    require_allowed(stranger, {overflow_uid()})
