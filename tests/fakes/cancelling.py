"""Cancelling a task at each of its awaits in turn.

Owns counting the steps that a task takes between its awaits, and cancelling it at one of them. What must hold
afterwards is the tests' to say.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import trio
from trio.abc import Instrument


class Steps(Instrument):
    """Counts the steps of one task, and cancels `scope` when it comes to step `last`."""

    def __init__(self, scope: trio.CancelScope, last: int | None) -> None:
        self._task = trio.lowlevel.current_task()
        self._scope = scope
        self._last = last
        self.count = 1
        """The first step is the one that this was made in."""

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        if task is self._task:
            self.count += 1
            if self.count == self._last:
                self._scope.cancel()


async def cut_off(call: Callable[[], Awaitable[object]], last: int | None = None) -> int:
    """Run `call`, and cancel it as it comes to its step `last`: the await before it, or with 1 the first one,
    is broken off. Returns the steps it took; with None it is not cancelled, and every number up to what is
    returned is a place to cancel it at.
    """
    steps: list[int] = []

    async def run() -> None:
        with trio.CancelScope() as scope:
            counting = Steps(scope, last)
            if last == 1:
                scope.cancel()
            trio.lowlevel.add_instrument(counting)
            try:
                await call()
            finally:
                trio.lowlevel.remove_instrument(counting)
                steps.append(counting.count)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(run)
    return steps[0]
