"""Binding a Unix socket: a stale one is replaced, a live one is an error.

Owns the socket file from bind to unlink, unless another process bound it. Must not know who connects.
"""

from __future__ import annotations

import errno
import fcntl
import grp
import os
import socket
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from intercept_protocol.text import visible
from interceptd.connections.received_fds import let_send_descriptors

BACKLOG = 1024
"""The VPs of a new VMM attach in one burst; a backlog under 512 was seen to refuse some."""


LONGEST_PATH = 107
"""In bytes: sun_path of unix(7) has 108, the last of which is a NUL."""
LOCK_SECONDS, LOCK_POLL_SECONDS = 5.0, 0.01
"""Generous: another daemon holds the lock only while it binds."""


class ListenError(Exception):
    """A socket cannot be used; the text names it and the cause, and is safe to print on a terminal."""

    def __init__(self, message: str) -> None:
        super().__init__(visible(message))


@contextmanager
def listen_unix(
    path: str,
    mode: int,
    passed: socket.socket | None = None,
    *,
    group: str | None = None,
    kept: socket.socket | None = None,
) -> Iterator[socket.socket]:
    """A listening AF_UNIX socket at `path` with the file mode `mode` and the group `group` (None: our own).
    Closes it and removes the file afterwards.

    Blocks, for up to `LOCK_SECONDS`, while other daemons bind in the same directory. `passed` is a socket
    that a service manager already listens on: it is closed afterwards, and its file stays. `kept` is one that
    a predecessor bound: it is used if it can still be reached at `path`, and closed otherwise. No connection
    may send descriptors unless `let_send_descriptors` permits it.
    """
    if kept is not None and (passed is not None or not _reached_at(path, kept)):
        kept.shutdown(socket.SHUT_RDWR)  # the store's duplicate, too: clients that wait there see the end
        kept.close()
        kept = None
    if passed is not None:
        with passed:
            let_send_descriptors(passed, may=False)
            yield passed
        return
    listener = kept or socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        let_send_descriptors(listener, may=False)
        try:
            if kept is None:
                _bind(listener, path, mode, group)
            else:
                _open_to(path, mode, group)
            identity = _identity(path)
        except OSError as error:
            raise ListenError(f"{path}: {error.strerror or error}") from error
        try:
            yield listener
        finally:
            with suppress(OSError):
                if _identity(path) == identity:  # else another daemon has replaced it
                    os.unlink(path)
    finally:
        listener.close()


def _reached_at(path: str, kept: socket.socket) -> bool:
    """Whether `kept` was bound for `path`, and a socket is still there."""
    try:
        return kept.getsockname() == _unready(path) and stat.S_ISSOCK(os.lstat(path).st_mode)
    except FileNotFoundError:
        return False


def _open_to(path: str, mode: int, group: str | None) -> None:
    """Set group and mode, which the configuration may have changed since the socket was bound."""
    if group is not None:
        _change_group(path, group)
    os.chmod(path, mode)


def _unready(path: str) -> str:
    """The path that a socket is bound to until it listens. getsockname(2) keeps returning it."""
    return os.fsdecode(os.fsencode(path)[: LONGEST_PATH - 1] + b"~")


def _bind(listener: socket.socket, path: str, mode: int, group: str | None) -> None:
    """Bind and listen under a lock on the directory, so that of two daemons started at once the second finds
    the first. The path appears only once the socket listens: a process that sees it can connect."""
    if not path or "\0" in path:
        raise ListenError(f"{path!r}: not a path")
    if (length := len(os.fsencode(path))) > LONGEST_PATH:
        raise ListenError(f"{path}: is {length} bytes long; a socket path may have {LONGEST_PATH}")
    unready = _unready(path)
    with _locked(Path(path).parent):
        _require_free(path)
        _require_free(unready)
        with suppress(FileNotFoundError):
            os.unlink(unready)  # left by a daemon that was killed before it renamed it
        umask = os.umask(0o777 & ~mode)  # a chmod afterwards would be too late
        try:
            listener.bind(unready)
        finally:
            os.umask(umask)
        try:
            if group is not None:
                _change_group(unready, group)  # before any process can connect
            listener.listen(BACKLOG)
            _replace(unready, path)
        except BaseException:
            os.unlink(unready)
            raise


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Hold a flock(2) on the directory. It has no timeout, so we poll."""
    try:
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:
        raise ListenError(f"{directory}: the directory for the socket does not exist") from None
    try:
        deadline = time.monotonic() + LOCK_SECONDS
        while not _try_lock(descriptor):
            if time.monotonic() >= deadline:
                raise ListenError(
                    f"{directory}: another process has held a lock (flock) on it for {LOCK_SECONDS} s"
                )
            time.sleep(LOCK_POLL_SECONDS)
        yield
    finally:
        os.close(descriptor)


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _change_group(path: str, group: str) -> None:
    """Raises `ListenError`, which names the key, if the group does not exist or chown(2) is not permitted."""
    try:
        gid = int(group) if group.isdecimal() else grp.getgrnam(group).gr_gid
        os.chown(path, -1, gid)
    except KeyError:
        raise ListenError(f"socket_group: no group {group!r}") from None
    except (OSError, OverflowError) as error:
        raise ListenError(
            f"socket_group: cannot change the group to {group!r}; the daemon's user must be a member: "
            f"{error.strerror if isinstance(error, OSError) else error}"
        ) from error


def _require_free(path: str) -> None:
    """Raises `ListenError` unless `path` does not exist, or is a socket on which no process listens."""
    try:
        status = os.lstat(path)
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(status.st_mode):
        raise ListenError(f"{path}: exists and is not a socket")
    match _connect(path):
        case errno.ECONNREFUSED | errno.ENOENT:  # no listener; or its owner has just removed it
            return
        case 0 | errno.EAGAIN:  # connected; or its backlog is full
            raise ListenError(f"{path}: is in use by a live daemon")
        case errno.EPROTOTYPE:  # only an open socket gives this error
            raise ListenError(f"{path}: is in use by another program, for a socket that is not SOCK_STREAM")
        case number:
            raise ListenError(
                f"{path}: cannot tell whether a daemon listens there: {os.strerror(number)}; "
                f"{_owner(status)}: remove it if it is stale"
            )


def _connect(path: str) -> int:
    """Try to connect once; returns the errno, 0 for success."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        return probe.connect_ex(path)


def _replace(unready: str, path: str) -> None:
    """Replace a stale socket by ours. Raises `ListenError` if only the owner of the stale one may: in a
    directory with the sticky bit."""
    try:
        os.rename(unready, path)
    except PermissionError as error:
        raise ListenError(
            f"{path}: is stale, but cannot be replaced: {error.strerror}; "
            f"{_owner(os.lstat(path))}, who can remove it"
        ) from error


def _owner(status: os.stat_result) -> str:
    return f"the socket belongs to uid {status.st_uid}"


def _identity(path: str) -> tuple[int, int]:
    status = os.stat(path)
    return status.st_dev, status.st_ino
