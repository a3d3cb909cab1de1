"""A lock that is acquired without a checkpoint when it is free.

Owns one trio.Lock and who holds it. Must not know what it protects. Acquiring a free `trio.Lock` is a
checkpoint: the task goes to the end of the run queue, and one step becomes two.
"""

from __future__ import annotations

from types import TracebackType

import trio


class EagerLock:
    """Used with `async with`. First in, first out: no task overtakes one that waits."""

    def __init__(self) -> None:
        self._lock = trio.Lock()
        self._holder: trio.lowlevel.Task | None = None

    def locked(self) -> bool:
        return self._lock.locked()

    @property
    def is_mine(self) -> bool:
        """Whether the running task holds the lock."""
        return self._holder is trio.lowlevel.current_task()

    async def __aenter__(self) -> None:
        try:
            self._lock.acquire_nowait()
        except trio.WouldBlock:
            await self._lock.acquire()
        self._holder = trio.lowlevel.current_task()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._holder = None
        self._lock.release()
