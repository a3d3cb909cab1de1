"""Notices peers that hang up, or send what they may not, while they wait for an answer.

Owns a second epoll instance and the one task that waits on it, for all connections: an entry in it and a
cancel scope are cheaper than a nursery with a task per request. Must not know requests.
"""

from __future__ import annotations

import select
from typing import NoReturn

import trio

HUNG_UP = select.EPOLLRDHUP | select.EPOLLONESHOT
READABLE_OR_HUNG_UP = select.EPOLLIN | HUNG_UP
"""What ends a wait. One-shot, because a cancelled wait may go on for a while in a shielded section: the task
must not spin."""
AT_ONCE = 64
"""Waits that one step cancels, some 10 us each: a process with thousands of connections may exit."""


class HangupWatch:
    """One for all connections; `run` is its task."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._waits: dict[int, trio.CancelScope] = {}

    async def run(self) -> NoReturn:
        """Cancel the waits whose events happen, until cancelled itself."""
        while True:
            await trio.lowlevel.wait_readable(self._epoll.fileno())
            for descriptor, _ in self._epoll.poll(0, AT_ONCE):
                self._waits[descriptor].cancel()

    def add(self, descriptor: int, events: int, wait: trio.CancelScope) -> None:
        """Cancel `wait` when one of these events happens to this socket."""
        self._epoll.register(descriptor, events)
        self._waits[descriptor] = wait

    def remove(self, descriptor: int) -> None:
        self._epoll.unregister(descriptor)
        del self._waits[descriptor]
