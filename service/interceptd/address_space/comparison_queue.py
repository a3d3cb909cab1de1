"""Comparisons of all partitions, one at a time.

Owns the order in which they run. Each is a worker thread that needs the interpreter again after every
look-up; many at once would keep it from the event loop. Must not know what is compared.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Final

import trio

PATIENCE: Final = 0.02
"""Seconds to wait for another comparison. One takes 0.5 ms; one that takes this long is blocked in the
kernel, where it does not need the interpreter."""


class ComparisonQueue:
    """One per daemon. The uids take turns, whatever the number of their partitions."""

    def __init__(self) -> None:
        self._gate = trio.Lock()
        self._lines: dict[int, trio.Lock] = {}

    @asynccontextmanager
    async def turn(self, uid: int) -> AsyncIterator[None]:
        """Wait until it is the caller's turn, or until the one that has it does not end."""
        line = self._lines.setdefault(uid, trio.Lock())
        try:
            async with AsyncExitStack() as held:
                for lock in (line, self._gate):
                    with trio.move_on_after(PATIENCE):
                        await held.enter_async_context(lock)
                yield
        finally:
            if not line.locked() and self._lines.get(uid) is line:
                del self._lines[uid]
