"""Binding a Unix socket, and the credentials of its peer."""

from __future__ import annotations

import errno
import grp
import os
import select
import socket
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from fakes.locked_directory import locked
from intercept_protocol.errors import WireError
from interceptd.connections.peer import Peer, overflow_uid, peer_groups, require_allowed
from interceptd.connections.unix_listener import BACKLOG, ListenError, listen_unix


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
    with listen_unix(path, 0o600) as listener, connect(path) as client:
        assert client.getpeername() == listener.getsockname()


def test_a_live_socket_is_refused_and_stays(path: str) -> None:
    with listen_unix(path, 0o600):
        with pytest.raises(ListenError, match="is in use by a live daemon"), listen_unix(path, 0o600):
            pass
        connect(path).close()


def test_a_live_socket_with_a_full_backlog_is_still_live(path: str) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as busy:
        busy.bind(path)
        busy.listen(0)
        with connect(path), pytest.raises(ListenError, match="is in use"), listen_unix(path, 0o600):
            pass


@pytest.mark.parametrize("kind", [socket.SOCK_DGRAM, socket.SOCK_SEQPACKET])
def test_a_live_socket_of_another_type_is_another_programs_and_stays(
    path: str, kind: socket.SocketKind
) -> None:
    with socket.socket(socket.AF_UNIX, kind) as other:
        other.bind(path)
        with pytest.raises(ListenError, match="is in use by another program"), listen_unix(path, 0o600):
            pass
        assert os.path.exists(path)


def test_a_stale_socket_of_another_type_is_replaced(path: str) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as dead:
        dead.bind(path)
    with listen_unix(path, 0o600) as listener, connect(path) as client:
        assert client.getpeername() == listener.getsockname()


def test_a_file_that_is_not_a_socket_is_refused_and_stays(path: str) -> None:
    Path(path).write_text("precious")
    with pytest.raises(ListenError, match="exists and is not a socket"), listen_unix(path, 0o600):
        pass
    assert Path(path).read_text() == "precious"


def test_a_missing_directory_is_named_with_the_cause(tmp_path: Path) -> None:
    missing = str(tmp_path / "none" / "d.sock")
    with (
        pytest.raises(
            ListenError, match=f"{os.path.dirname(missing)}: the directory for the socket does not exist"
        ),
        listen_unix(missing, 0o600),
    ):
        pass


@pytest.mark.parametrize("mode", [0o600, 0o660, 0o666])
def test_the_socket_has_its_mode_and_the_process_its_umask(path: str, mode: int) -> None:
    before = os.umask(0o022)
    try:
        with listen_unix(path, mode):
            assert stat.S_IMODE(os.stat(path).st_mode) == mode
        assert os.umask(0o022) == 0o022
    finally:
        os.umask(before)


def test_the_socket_file_is_gone_afterwards(path: str) -> None:
    with listen_unix(path, 0o600):
        pass
    assert not os.path.exists(path)


def test_the_socket_file_of_another_daemon_stays_when_we_end(path: str) -> None:
    with listen_unix(path, 0o600):
        os.unlink(path)
        leave_stale(path)
    assert os.path.exists(path)


def test_the_backlog_takes_a_burst_of_vps(path: str) -> None:
    assert BACKLOG >= 512
    with listen_unix(path, 0o600):
        burst = [connect(path) for _ in range(300)]
        for client in burst:
            client.close()


def test_a_locked_directory_is_an_error_that_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("interceptd.connections.unix_listener.LOCK_SECONDS", 0.01)
    with (
        locked(tmp_path),
        pytest.raises(ListenError, match=f"{tmp_path}: another process has held a lock"),
        listen_unix(str(tmp_path / "d.sock"), 0o600),
    ):
        pass
    assert os.listdir(tmp_path) == []


def test_a_group_that_is_not_there_is_an_error_that_names_the_key(path: str) -> None:
    with (
        pytest.raises(ListenError, match="socket_group: no group 'no-such'"),
        listen_unix(path, 0o660, group="no-such"),
    ):
        pass


def test_the_socket_is_given_to_its_group_by_name(path: str) -> None:
    try:
        group = grp.getgrgid(os.getegid()).gr_name
    except KeyError:
        pytest.skip(f"gid {os.getegid()} has no name on this machine")
    with listen_unix(path, 0o660, group=group):
        assert os.stat(path).st_gid == os.getegid()


# ------------------------------------------------ a listener that an earlier daemon bound


@pytest.fixture
def kept(path: str) -> Iterator[socket.socket]:
    """What a daemon had stored that was killed."""
    listening = listen_unix(path, 0o600)
    bound = listening.__enter__()
    kept = bound.dup()
    bound.detach()
    yield kept
    kept.close()


def test_a_kept_listener_is_used_again_with_what_waits_in_it_and_its_file_is_removed(
    path: str, kept: socket.socket
) -> None:
    with connect(path) as client:
        client.send(b"waits")
        with listen_unix(path, 0o640, kept=kept) as listener:
            assert listener is kept
            assert stat.S_IMODE(os.stat(path).st_mode) == 0o640
            accepted, _ = listener.accept()
            with accepted:
                assert accepted.recv(5) == b"waits"
    assert not os.path.exists(path)


def test_a_kept_listener_is_given_to_the_group_of_now(path: str, kept: socket.socket) -> None:
    with pytest.raises(ListenError, match="socket_group: no group 'no-such'"):
        listen_unix(path, 0o660, group="no-such", kept=kept).__enter__()
    assert kept.fileno() == -1


@pytest.mark.parametrize("file", ["gone", "not a socket", "of another path"])
def test_a_kept_listener_that_cannot_be_reached_at_the_path_is_shut_down(
    path: str, tmp_path: Path, kept: socket.socket, file: str
) -> None:
    with kept.dup() as stored:
        match file:
            case "gone":
                os.unlink(path)
            case "not a socket":
                os.unlink(path)
                Path(path).write_text("precious")
                path = str(tmp_path / "other.sock")
            case _:
                path = str(tmp_path / "other.sock")
                leave_stale(path)
        with listen_unix(path, 0o600, kept=kept) as listener, connect(path) as client:
            assert client.getpeername() == listener.getsockname()
            assert (listener is kept, kept.fileno()) == (False, -1)
            polled = select.poll()
            polled.register(stored)
            assert polled.poll(0) == [(stored.fileno(), select.POLLIN | select.POLLHUP)]  # its store drops it


def test_a_socket_of_a_service_manager_takes_the_place_of_a_kept_one(
    path: str, tmp_path: Path, kept: socket.socket
) -> None:
    with (
        listen_unix(str(tmp_path / "unit.sock"), 0o600) as passed,
        listen_unix(path, 0o600, passed, kept=kept) as listener,
    ):
        assert (listener is passed, kept.fileno()) == (True, -1)


# ------------------------------------------------ peers


def test_a_peers_supplementary_groups_are_read_from_the_kernel() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        assert peer_groups(ours) == frozenset(os.getgroups())


@pytest.mark.parametrize(("gid", "groups"), [(7, ()), (8, (7, 9))])
def test_a_peer_is_allowed_by_one_of_its_groups_and_else_eacces(gid: int, groups: tuple[int, ...]) -> None:
    require_allowed(Peer(1, 1001, gid), {0}, [7], lambda: groups)
    with pytest.raises(WireError, match="and none of its groups in allowed_gids") as refused:
        require_allowed(Peer(1, 1001, gid), {0}, [6], lambda: groups)
    assert refused.value.number == errno.EACCES


def test_an_allowed_group_does_not_let_the_overflow_uid_in() -> None:
    with pytest.raises(WireError, match="the overflow uid"):
        require_allowed(Peer(1, overflow_uid(), 7), {0}, [7], lambda: (7,))


def test_a_peer_is_read_from_the_kernel() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        assert Peer.of(ours) == Peer(os.getpid(), os.geteuid(), os.getegid())


def test_a_uid_that_is_not_named_is_eacces_and_named_and_the_others_are_allowed() -> None:
    require_allowed(Peer(1, 1000, 1000), {0, 1000})
    with pytest.raises(WireError, match="EACCES: uid 1001 is not in allowed_uids") as refused:
        require_allowed(Peer(1, 1001, 1000), {0, 1000})
    assert refused.value.details == {"uid": 1001}


def test_the_overflow_uid_is_refused_with_a_hint_unless_named() -> None:
    stranger = Peer(1, overflow_uid(), 65534)
    with pytest.raises(WireError, match="the overflow uid"):
        require_allowed(stranger, {0})
    require_allowed(stranger, {overflow_uid()})
