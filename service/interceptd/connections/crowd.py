"""The connections of one uid that wait for bytes, when they are many: a few of them wake up in each round.

Owns an epoll instance and the task that waits on it. trio would wake all that are readable in one round of
the event loop, and to wake thousands takes long even if each goes back to wait for its turn. Must not know
what the connections are for.
"""

from __future__ import annotations

import select
import socket
from typing import Final

import trio
from trio.lowlevel import Abort, RaiseCancelT

FEW: Final = 96
"""So many connections of a uid wait by themselves, which costs less: they may all wake up in one round."""
AT_ONCE: Final = 16
"""Connections that wake up in one round, up to 0.1 ms each."""
READABLE: Final = select.EPOLLIN | select.EPOLLRDHUP | select.EPOLLONESHOT


class Crowd:
    """Holds an epoll instance and a task only while somebody waits."""

    def __init__(self) -> None:
        self._waiting: dict[int, trio.lowlevel.Task] = {}
        self._registered = 0
        """Those that wait, and those that were woken and have not run yet."""
        self._epoll: select.epoll | None = None
        self._watching = trio.CancelScope()

    async def wait_readable(self, connection: socket.socket, nursery: trio.Nursery) -> None:
        """Like trio's, for a connection that nobody closes meanwhile. `nursery` runs the task that wakes."""
        descriptor = connection.fileno()
        if self._epoll is None:
            self._epoll, self._watching = select.epoll(), trio.CancelScope()
            nursery.start_soon(self._watch, self._epoll, self._watching)
        epoll = self._epoll
        epoll.register(descriptor, READABLE)
        self._registered += 1
        self._waiting[descriptor] = trio.lowlevel.current_task()

        def abort(_: RaiseCancelT) -> Abort:
            del self._waiting[descriptor]
            return Abort.SUCCEEDED

        try:
            await trio.lowlevel.wait_task_rescheduled(abort)
        finally:
            epoll.unregister(descriptor)
            self._registered -= 1
            if not self._registered:
                self._watching.cancel()
                self._epoll = None

    async def _watch(self, epoll: select.epoll, watching: trio.CancelScope) -> None:
        with watching, epoll:
            while True:
                await trio.lowlevel.wait_readable(epoll.fileno())
                for descriptor, _ in epoll.poll(0, AT_ONCE):
                    if (task := self._waiting.pop(descriptor, None)) is not None:
                        trio.lowlevel.reschedule(task)
