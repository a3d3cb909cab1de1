"""The waiting connections of one uid, when they are many: a few of them wake up in each round.

Owns an epoll instance and the task that waits on it. trio would wake all readable ones in one round of the
event loop, and waking thousands takes long even if each then waits for its turn. Must not know what the
connections are for.
"""

from __future__ import annotations

import select
import socket
from contextlib import suppress
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
        self._watch: _Watch | None = None

    async def wait_readable(self, connection: socket.socket, nursery: trio.Nursery) -> None:
        """Like trio's, for a connection that nobody closes meanwhile. `nursery` runs the task that wakes.

        If the system refuses an epoll instance, or the nursery ends, the connection waits by itself.
        """
        if self._watch is None or self._watch.over:
            try:
                self._watch = _Watch(select.epoll())
            except OSError:
                await trio.lowlevel.wait_readable(connection)
                return
            nursery.start_soon(self._watch.run)
        watch = self._watch
        try:
            await watch.wait(connection.fileno())
        finally:
            if watch.leave(connection.fileno()) and self._watch is watch:
                self._watch = None


class _Watch:
    """One epoll instance and its task, from the first that waits to the last."""

    def __init__(self, epoll: select.epoll) -> None:
        self.over = False
        """Whether it wakes nobody any more."""
        self._epoll = epoll
        self._waiting: dict[int, trio.lowlevel.Task] = {}
        self._inside: set[int] = set()
        """Those that wait, and those that were woken and have not run yet."""
        self._scope = trio.CancelScope()

    async def run(self) -> None:
        """Wake up a few per round, until the last one has left; if it ends earlier, all."""
        try:
            with self._epoll, self._scope:
                while True:
                    await trio.lowlevel.wait_readable(self._epoll.fileno())
                    for descriptor, _ in self._epoll.poll(0, AT_ONCE):
                        self._wake(descriptor)
        finally:
            self.over = True
            for descriptor in list(self._waiting):
                self._wake(descriptor)

    async def wait(self, descriptor: int) -> None:
        self._inside.add(descriptor)
        self._epoll.register(descriptor, READABLE)
        self._waiting[descriptor] = trio.lowlevel.current_task()

        def abort(_: RaiseCancelT) -> Abort:
            del self._waiting[descriptor]
            return Abort.SUCCEEDED

        await trio.lowlevel.wait_task_rescheduled(abort)

    def leave(self, descriptor: int) -> bool:
        """After `wait`, however it ended. Returns whether that was the last one: then `run` ends."""
        self._inside.remove(descriptor)
        with suppress(OSError, ValueError):  # it could not be registered, or `run` has ended
            self._epoll.unregister(descriptor)
        if not self._inside:
            self._scope.cancel()
        return not self._inside

    def _wake(self, descriptor: int) -> None:
        task = self._waiting.pop(descriptor, None)
        if task is not None:
            trio.lowlevel.reschedule(task)
