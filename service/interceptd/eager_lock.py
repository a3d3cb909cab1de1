"""A lock that is acquired without a checkpoint when it is free.

Owns who holds it and who waits. Must not know what it protects. Acquiring a free `trio.Lock` is a checkpoint:
the task goes to the end of the run queue, and one step becomes two. It also notes who holds it, in case that
task ends without a release, which `async with` excludes: half of what a free lock takes.
"""

from __future__ import annotations

from types import TracebackType

import trio


class EagerLock:
    """Used with `async with`. First in, first out: no task overtakes one that waits."""

    __slots__ = ("_holder", "_waiting")

    def __init__(self) -> None:
        self._holder: trio.lowlevel.Task | None = None
        self._waiting: trio.lowlevel.ParkingLot | None = None
        """Created by the first task that waits."""

    def locked(self) -> bool:
        return self._holder is not None

    @property
    def is_mine(self) -> bool:
        """Whether the running task holds the lock."""
        return self._holder is trio.lowlevel.current_task()

    async def __aenter__(self) -> None:
        if self._holder is None:
            self._holder = trio.lowlevel.current_task()
            return
        if self._waiting is None:
            self._waiting = trio.lowlevel.ParkingLot()
        await self._waiting.park()  # until `__aexit__` makes this task the holder

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._holder = self._waiting.unpark(count=1)[0] if self._waiting else None
