"""Whose long search is next, among all partitions.

Owns the order of their turns: one at a time, the uids by turns, and within a uid first come, first served. A
search is a worker thread that needs the interpreter again after every system call; many at once would keep it
from the event loop. Must not know what is searched.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final

import trio

PATIENCE: Final = 0.005
"""Seconds until a turn passes on although it has not ended. One takes a millisecond; one that takes this long
is blocked in the kernel, where it does not need the interpreter."""


class TurnQueue:
    """One per daemon."""

    def __init__(self) -> None:
        self._holder: trio.CancelScope | None = None
        self._waiting: dict[int, deque[trio.CancelScope]] = {}
        """By uid, the next one first. A scope that is cancelled wakes its task: either the turn has passed to
        it, or the holder's time is over."""

    @asynccontextmanager
    async def turn(self, uid: int) -> AsyncIterator[None]:
        """Wait until it is the caller's turn, or until the one that has it does not end."""
        mine = trio.CancelScope()
        try:
            if self._holder is None:
                self._holder = mine
            else:
                await self._wait(uid, mine)
            yield
        finally:
            if self._holder is mine:
                self._pass_on()
            else:  # passed on already, or cancelled before it was next
                self._watch_holder()

    async def _wait(self, uid: int, mine: trio.CancelScope) -> None:
        self._waiting.setdefault(uid, deque()).append(mine)
        self._watch_holder()
        try:
            with mine:
                await trio.sleep_forever()
        finally:
            still_waiting = self._leave(uid, mine)
        if still_waiting:
            self._take(uid, mine)

    def _pass_on(self) -> None:
        """To the first of the uid that has waited longest for a turn."""
        self._holder = None
        if self._waiting:
            uid, line = next(iter(self._waiting.items()))
            following = line[0]
            self._leave(uid, following)
            self._take(uid, following)
            following.cancel()

    def _take(self, uid: int, mine: trio.CancelScope) -> None:
        """Have the turn; the uid's next one goes behind the other uids."""
        self._holder = mine
        if line := self._waiting.pop(uid, None):
            self._waiting[uid] = line
        self._watch_holder()

    def _leave(self, uid: int, mine: trio.CancelScope) -> bool:
        """Leave the line. False if the turn has passed to `mine` already, even if it has passed on since."""
        line = self._waiting.get(uid, deque())
        if mine not in line:
            return False
        line.remove(mine)
        if not line:
            del self._waiting[uid]
        return True

    def _watch_holder(self) -> None:
        """The one that is next, and no other, waits no longer than its patience lasts."""
        if self._waiting:
            following = next(iter(self._waiting.values()))[0]
            if following.deadline == math.inf:
                following.deadline = trio.current_time() + PATIENCE
