"""How long a port stops where it can.

Owns the two kinds of pausing: gates that a test holds and opens by name, and pauses that were drawn
beforehand. Must not know what the ports do.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterable
from itertools import cycle

import trio

from explorer.pauses import Asked, Point

GATE_PATIENCE = 600.0
"""Virtual seconds after which a gate opens by itself: a call that is shielded would else keep a test that has
failed from ending."""


class Gate:
    """One stop of one call."""

    def __init__(self) -> None:
        self._reached = trio.Event()
        self._opened = trio.Event()

    @property
    def reached(self) -> bool:
        return self._reached.is_set()

    async def wait_reached(self) -> None:
        """Block until a call stands at the gate."""
        await self._reached.wait()

    def open(self) -> None:
        """Release the call."""
        self._opened.set()

    async def stop(self) -> None:
        self._reached.set()
        with trio.move_on_after(GATE_PATIENCE):
            await self._opened.wait()


class Gates:
    """Calls run through without a checkpoint, except where a gate is held."""

    def __init__(self) -> None:
        self._held: defaultdict[Point, deque[Gate]] = defaultdict(deque)

    def hold(self, point: Point) -> Gate:
        """The next call that comes to `point`, and meets no gate held before, stops there until opened."""
        gate = Gate()
        self._held[point].append(gate)
        return gate

    async def at(self, point: Point, asked: Asked) -> None:  # noqa: ARG002 - a gate is a place
        if self._held[point]:
            await self._held[point].popleft().stop()


class DrawnPauses:
    """So many checkpoints at each point that is passed, over and over.

    Drawn beforehand: a strategy that runs dry inside a task would end the run from within a nursery.
    """

    def __init__(self, checkpoints: Iterable[int]) -> None:
        self._checkpoints = cycle(checkpoints)

    async def at(self, point: Point, asked: Asked) -> None:  # noqa: ARG002 - a draw serves every point
        for _ in range(next(self._checkpoints)):
            await trio.lowlevel.checkpoint()
