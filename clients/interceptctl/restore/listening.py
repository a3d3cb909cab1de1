"""The socket on which the VMM hands over its memory.

Owns the path: that nothing in use is replaced, that only its owner can connect, and its removal. Must not
know who accepts.
"""

from __future__ import annotations

import errno
import os
import socket
import stat
from pathlib import Path
from typing import Final

from intercept_client import LONGEST_SOCKET_PATH
from intercept_protocol.text import sentence
from interceptctl.operator_client import Failure

BACKLOG: Final = 16


class Listening:
    """A listening socket at `path`. Closing it leaves the path, where the daemon may still listen."""

    def __init__(self, path: Path) -> None:
        """Raises `Failure` if something is there that is not a socket which its listener has left."""
        if (length := len(os.fsencode(path))) > LONGEST_SOCKET_PATH:
            raise Failure(
                f"{path}: the path has {length} bytes, and that of a socket at most {LONGEST_SOCKET_PATH}; "
                "a path relative to the working directory is shorter"
            )
        self.path = path
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            _clear(path)
            umask = os.umask(0o177)
            try:
                self._socket.bind(os.fspath(path))
            finally:
                os.umask(umask)
            self._identity = _identity(path)
            self._socket.listen(BACKLOG)
        except BaseException as error:
            self._socket.close()
            if isinstance(error, OSError):
                raise Failure(_why(path, error)) from error
            raise

    def fileno(self) -> int:
        return self._socket.fileno()

    def close(self) -> None:
        self._socket.close()

    def remove(self) -> None:
        """Remove the path, if it still is this socket's."""
        try:
            if _identity(self.path) == self._identity:
                self.path.unlink()
        except OSError:
            return  # somebody else did, or may


def _clear(path: Path) -> None:
    """Make room at `path`: remove a socket on which nobody listens."""
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise Failure(f"{path}: there is a file that is not a socket; choose another path for --listen")
    # Of another type than a listener: it is refused, and nobody takes it for the VMM.
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as probe:
        try:
            probe.connect(os.fspath(path))
        except ConnectionRefusedError:
            path.unlink()
        except OSError as error:
            if error.errno != errno.EPROTOTYPE:
                raise
            raise _in_use(path) from error
        else:
            raise _in_use(path)


def _in_use(path: Path) -> Failure:
    return Failure(
        f"{path}: another process, or the daemon for an earlier restore, listens there; "
        "choose another path for --listen"
    )


def _identity(path: Path) -> tuple[int, int]:
    found = path.lstat()
    return found.st_dev, found.st_ino


def _why(path: Path, error: OSError) -> str:
    match error:
        case FileNotFoundError():
            return f"{path}: there is no such directory"
        case _:
            return f"{path}: {sentence(OSError(error.errno, error.strerror))}"
