"""Another partition's task, which is always ready: it runs whenever another task yields."""

from __future__ import annotations

import trio


class Others:
    """`turns` that it got since it was made."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self.turns = 0
        nursery.start_soon(self._run)

    async def _run(self) -> None:
        while True:
            self.turns += 1
            await trio.lowlevel.checkpoint()
