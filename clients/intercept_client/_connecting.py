"""Reaching the daemon's socket.

Owns one connection attempt and its errors, which failures a restart of the daemon explains, and how
descriptors accompany bytes; must not know how a shell waits between attempts, nor what a hello says.
"""

from __future__ import annotations

import array
import errno
import os
import socket
from collections.abc import Sequence
from typing import Final

from ._errors import ConnectionEnded, ConnectionLost

RETRY_DELAY: Final = 0.01
"""Seconds between attempts while the daemon's backlog is full."""
LONGEST_SOCKET_PATH: Final = 107
"""Bytes: sun_path of unix(7) has 108, the last of which is a NUL."""

RESTART_SECONDS: Final = 10.0
"""How long a connection is begun again because it ended before its hello was answered (H-16)."""
OPEN_SECONDS: Final = RESTART_SECONDS + 5.0
"""How long `open` takes at most if its caller says nothing else: the daemon bounds a hello by 5 s."""
RESTART_PAUSE: Final = 0.05
"""Seconds between these attempts. A restart takes some tenths of a second, and each attempt counts as five
requests (T-11)."""

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


class RestartWindow:
    """The time in which one opening of a connection is begun again, because the daemon is restarted (H-16).

    It begins when a connection ends before its hello was answered. Until then a socket that is missing, or on
    which nobody listens, is an error at once: there is no daemon.
    """

    __slots__ = ("_end",)

    def __init__(self) -> None:
        self._end: float | None = None

    def covers(self, failure: OSError, now: float) -> bool:
        """Whether to try again after this failure, at `now` in seconds of a monotonic clock."""
        match failure:
            case ConnectionEnded():
                return False  # the daemon refused, which is an answer
            case ConnectionLost() if self._end is None:
                self._end = now + RESTART_SECONDS
            case ConnectionLost() | ConnectionRefusedError() | FileNotFoundError():
                pass
            case _:
                return False
        return self._end is not None and now < self._end


def rights(descriptors: Sequence[int]) -> list[tuple[int, int, bytes]]:
    """The ancillary data of a `sendmsg` that brings copies of `descriptors` (SCM_RIGHTS, unix(7))."""
    return [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors).tobytes())]
