"""A lock that is had at once where nobody holds it.

Owns one trio.Lock. Must not know what it protects. To take a free `trio.Lock` is a checkpoint: the task gives
up its turn and comes back in the next round of the event loop, which costs 3 us and makes two steps of what
is one.
"""

from __future__ import annotations

from types import TracebackType

import trio


class EagerLock:
    """`async with` it. FIFO: who waits is handed the lock, and nobody overtakes."""

    def __init__(self) -> None:
        self._lock = trio.Lock()

    def locked(self) -> bool:
        return self._lock.locked()

    @property
    def is_mine(self) -> bool:
        """Whether the running task holds it."""
        return self._lock.statistics().owner is trio.lowlevel.current_task()

    async def __aenter__(self) -> None:
        try:
            self._lock.acquire_nowait()
        except trio.WouldBlock:
            await self._lock.acquire()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lock.release()
