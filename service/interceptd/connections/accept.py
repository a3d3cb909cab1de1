"""The loop that accepts connections from a listening socket.

Owns its fairness to other tasks, and its behaviour when the system has no descriptor or memory for another
connection: it tries again, and the log says once a minute why. Must not know who connects.
"""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Awaitable, Callable, Mapping
from typing import Final, NoReturn

import structlog
import trio

from interceptd.descriptor_reserve import kept_from_newcomers
from interceptd.log_pace import LogPace

log = structlog.get_logger()

RETRY_SECONDS: Final = 0.1
LEFT: Final = frozenset({
    errno.EAGAIN, errno.ECONNABORTED, errno.EPERM, errno.ENETDOWN, errno.EPROTO, errno.ENOPROTOOPT,
    errno.EHOSTDOWN, errno.ENONET, errno.EHOSTUNREACH, errno.EOPNOTSUPP, errno.ENETUNREACH,
})  # fmt: skip
"""accept(2): the peer is gone, its network is, or a security module refused it."""
NO_ROOM: Final = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})
"""accept(2): the process or the system has no descriptor, or the kernel no memory, for now."""


class Shortage:
    """Logs a want of descriptors or memory, of each kind once a minute, for all listeners. What `suspect`
    returns goes along: who has most connections."""

    def __init__(self, suspect: Callable[[], Mapping[str, object]] = dict) -> None:
        self._suspect = suspect
        self._pace = LogPace()

    def not_accepted(self, error: OSError) -> None:
        name = errno.errorcode[error.errno or 0]
        if (not_warned := self._pace.passed_over(name)) is not None:
            why = f"{name}: {os.strerror(error.errno or 0)}"
            log.error("connection_not_accepted", error=why, **self._suspect(), not_warned=not_warned)

    def near(self) -> None:
        """Only the reserve is left."""
        if (not_warned := self._pace.passed_over("reserve")) is not None:
            log.warning("descriptors_run_out", **self._suspect(), not_warned=not_warned)


async def accept_forever(
    listener: socket.socket,
    serve: Callable[[socket.socket], Awaitable[None]],
    connections: trio.Nursery,
    shortage: Shortage,
) -> NoReturn:
    """Start `serve` in `connections` for each connection, which it owns from then on.

    Accepts one per round of the event loop, so that a flood of connections delays VPs no further.
    """
    listener.setblocking(False)
    while True:
        await trio.lowlevel.wait_readable(listener)
        try:
            accepted, _ = listener.accept()
        except OSError as error:
            if error.errno in LEFT:
                continue
            if error.errno not in NO_ROOM:
                raise
            shortage.not_accepted(error)
            await trio.sleep(RETRY_SECONDS)
        else:
            if kept_from_newcomers(accepted.fileno()):
                shortage.near()
            connections.start_soon(serve, accepted)
