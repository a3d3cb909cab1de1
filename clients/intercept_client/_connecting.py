"""Reaching the daemon's socket.

Owns one connection attempt and its errors, and how descriptors accompany bytes; must not know how a shell
waits between attempts.
"""

from __future__ import annotations

import array
import errno
import os
import socket
from collections.abc import Sequence
from typing import Final

RETRY_DELAY: Final = 0.01
"""Seconds between attempts while the daemon's backlog is full."""
LONGEST_SOCKET_PATH: Final = 107
"""Bytes: sun_path of unix(7) has 108, the last of which is a NUL."""

StrPath = str | os.PathLike[str]


def connect_now(path: StrPath) -> socket.socket:
    """A non-blocking socket, connected.

    An AF_UNIX connect never completes later: if the backlog is full it raises `BlockingIOError`, and nothing
    reports when it no longer is, so try again after `RETRY_DELAY`. Every `OSError` names the path.
    """
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        sock.connect(os.fspath(path))
    except OSError as error:
        sock.close()
        if (length := len(os.fsencode(path))) > LONGEST_SOCKET_PATH:  # which has no number
            text = f"the path has {length} bytes, and that of a socket at most {LONGEST_SOCKET_PATH}"
            raise OSError(errno.ENAMETOOLONG, text, os.fspath(path)) from error
        raise OSError(error.errno, os.strerror(error.errno or 0), os.fspath(path)) from error
    except BaseException:
        sock.close()
        raise
    return sock


def rights(descriptors: Sequence[int]) -> list[tuple[int, int, bytes]]:
    """The ancillary data of a `sendmsg` that brings copies of `descriptors` (SCM_RIGHTS, unix(7))."""
    return [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors).tobytes())]
