"""Binding a Unix socket: a stale one is replaced, a live one is an error.

Owns the socket file from bind to unlink, unless somebody else bound it. Must not know who connects.
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

BACKLOG = 1024
"""A burst of VPs attaches at once; a backlog under 512 was seen to refuse some."""


LONGEST_PATH = 107
"""Bytes: sun_path of unix(7) has 108, the last of which is a NUL."""
LOCK_SECONDS, LOCK_POLL_SECONDS = 5.0, 0.01
"""Another daemon holds the lock for a millisecond."""


class ListenError(Exception):
    """A socket path that cannot be used; the text names it and the cause, and is fit for a terminal."""

    def __init__(self, message: str) -> None:
        super().__init__(visible(message))


@contextmanager
def listening(
    path: str, mode: int, passed: socket.socket | None = None, *, group: str | None = None
) -> Iterator[socket.socket]:
    """A listening AF_UNIX socket at `path` with the file mode `mode`, of `group` (None: ours); the file is
    gone afterwards.

    Blocks for other daemons that bind in the same directory at the same moment, for `LOCK_SECONDS` at most.
    `passed` listens already, at a place of its giver's: it is closed afterwards, and its file stays.
    """
    if passed is not None:
        with passed:
            yield passed
        return
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        try:
            identity = _bind(listener, path, mode, group)
        except OSError as error:
            raise ListenError(f"{path}: {error.strerror or error}") from error
        try:
            yield listener
        finally:
            with suppress(OSError):
                if _identity(path) == identity:  # another daemon may have taken the path over
                    os.unlink(path)
    finally:
        listener.close()


def _bind(listener: socket.socket, path: str, mode: int, group: str | None) -> tuple[int, int]:
    """Bind and listen under a lock on the directory, so that of two daemons that start at once one finds the
    other. The path appears when the socket listens: whoever sees it can connect."""
    if not path or "\0" in path:
        raise ListenError(f"{path!r}: is no path")
    if (length := len(os.fsencode(path))) > LONGEST_PATH:
        raise ListenError(f"{path}: has {length} bytes, and the path of a socket at most {LONGEST_PATH}")
    unready = os.fsdecode(os.fsencode(path)[: LONGEST_PATH - 1] + b"~")
    with _locked(Path(path).parent):
        _require_free(path)
        _require_free(unready)
        with suppress(FileNotFoundError):
            os.unlink(unready)  # of a daemon that was killed just here
        umask = os.umask(0o777 & ~mode)  # a chmod afterwards would leave a window
        try:
            listener.bind(unready)
        finally:
            os.umask(umask)
        try:
            if group is not None:
                _give(unready, group)  # while nobody can connect yet
            listener.listen(BACKLOG)
            _replace(unready, path)
        except BaseException:
            os.unlink(unready)
            raise
        return _identity(path)


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """flock(2), which knows no timeout: asked for again and again instead."""
    try:
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:
        raise ListenError(f"{directory}: there is no such directory to make a socket in") from None
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


def _give(path: str, group: str) -> None:
    """Raises `ListenError`, which names the key, if there is no such group or it is not ours to give to."""
    try:
        gid = int(group) if group.isdecimal() else grp.getgrnam(group).gr_gid
        os.chown(path, -1, gid)
    except KeyError:
        raise ListenError(f"socket_group: there is no group {group!r}") from None
    except (OSError, OverflowError) as error:
        raise ListenError(
            f"socket_group: the socket may not be given to {group!r}, unless the daemon's user is in it: "
            f"{error.strerror if isinstance(error, OSError) else error}"
        ) from error


def _require_free(path: str) -> None:
    """Nothing is at `path`, or a socket that nobody listens on any more. Raises `ListenError` otherwise, and
    where we cannot tell."""
    try:
        status = os.lstat(path)
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(status.st_mode):
        raise ListenError(f"{path}: exists and is not a socket")
    match _connect(path):
        case errno.ECONNREFUSED | errno.ENOENT:  # nobody listens; or its owner has removed it just now
            return
        case 0 | errno.EAGAIN:  # connected; or its backlog is full
            raise ListenError(f"{path}: is in use by a live daemon")
        case errno.EPROTOTYPE:  # which is said only of a socket that is open
            raise ListenError(f"{path}: is in use by another program, for a socket that is not SOCK_STREAM")
        case number:
            raise ListenError(
                f"{path}: cannot tell whether a daemon listens there: {os.strerror(number)}; "
                f"{_belongs(status)}: remove it if nobody does"
            )


def _connect(path: str) -> int:
    """The errno of one attempt, 0 for a connection."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        return probe.connect_ex(path)


def _replace(unready: str, path: str) -> None:
    """Put our socket in the place of one that nobody listens on. Raises `ListenError` where only the owner of
    that one may: in a directory with the sticky bit."""
    try:
        os.rename(unready, path)
    except PermissionError as error:
        raise ListenError(
            f"{path}: nobody listens there, but it cannot be replaced: {error.strerror}; "
            f"{_belongs(os.lstat(path))}, who may remove it"
        ) from error


def _belongs(status: os.stat_result) -> str:
    return f"the socket belongs to uid {status.st_uid}"


def _identity(path: str) -> tuple[int, int]:
    status = os.stat(path)
    return status.st_dev, status.st_ino
