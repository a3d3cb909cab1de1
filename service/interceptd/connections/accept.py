"""The loop that accepts connections from a listening socket.

Owns its fairness to other tasks, and its behaviour when the system has no descriptor or memory for another
connection. Must not know who connects.
"""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Awaitable, Callable
from typing import Final, NoReturn

import structlog
import trio

log = structlog.get_logger()

RETRY_SECONDS: Final = 0.1
NO_ROOM: Final = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})
"""accept(2): the process or the system has no descriptor, or the kernel no memory, for now."""


async def accept_forever(
    listener: socket.socket, serve: Callable[[socket.socket], Awaitable[None]], connections: trio.Nursery
) -> NoReturn:
    """Start `serve` in `connections` for each connection, which it owns from then on.

    Accepts one per round of the event loop, so that a flood of connections delays VPs no further.
    """
    listener.setblocking(False)
    while True:
        await trio.lowlevel.wait_readable(listener)
        try:
            accepted, _ = listener.accept()
        except (
            BlockingIOError,
            ConnectionAbortedError,
            PermissionError,
        ):  # the peer left, or a security module refused it
            continue
        except OSError as error:
            if error.errno not in NO_ROOM:
                raise
            name = errno.errorcode[error.errno]
            log.error("connection_not_accepted", error=f"{name}: {os.strerror(error.errno)}")  # noqa: TRY400
            await trio.sleep(RETRY_SECONDS)
        else:
            connections.start_soon(serve, accepted)
