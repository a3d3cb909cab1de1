"""The daemon is killed while it is exercised, and its keeper starts it again.

Owns when that happens, what the guests notice of it, and which answers it explains. Must not know how a
daemon is killed. What a daemon counts ends with it, but for what it said before.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Final

import trio

from intercept_protocol.messages import PartitionStatistics
from intercept_protocol.outcomes import Answer, AnyAnswer

from .clock import Clock, During
from .history import FOREVER
from .tally import Tally

LONGEST_DELAY: Final = 0.1
"""Seconds from a daemon's first answer to an intercept until it is asked for its counters."""
LAST_MOMENTS: Final = 0.01
"""Seconds from then until it is killed: it is not to be doing the same thing whenever it dies."""
MIDDLE: Final = (0.25, 0.75)
"""Between these shares of the exercise."""


class Kills:
    """`kill` ends the daemon at once; None for a daemon of somebody else's, who may restart it, too."""

    def __init__(self, clock: Clock, tally: Tally, kill: Callable[[], None] | None) -> None:
        self._clock = clock
        self._tally = tally
        self._kill = kill
        self._ticks: list[int] = []
        self._back_at = 0
        """When the first intercept was answered that was asked after the last kill; `FOREVER` until then."""
        self._back = trio.Event()
        self.lives: Final[list[PartitionStatistics]] = []
        """What each killed daemon said last."""
        self.waited = 0
        """Intercepts that were being answered at a kill, or asked while there was no daemon."""
        self.longest_wait = 0.0
        """Of those, in seconds."""
        self.surely: Final = Counter[AnyAnswer]()
        """Answers of the daemon that runs now."""
        self.perhaps: Final = Counter[AnyAnswer]()
        """Answers of that one or the one before it."""

    @property
    def count(self) -> int:
        return len(self._ticks)

    @property
    def are_ours(self) -> bool:
        """Whether nobody else restarts the daemon."""
        return self._kill is not None

    def may_explain(self, answer: AnyAnswer, during: During) -> bool:
        """Whether a restart can be why a VP was told to ask again, for a reason that the judge knows."""
        if not self.are_ours:
            return True
        return answer is Answer.RESTARTED and any(during.first < tick < during.last for tick in self._ticks)

    def answered(self, answer: AnyAnswer, during: During, seconds: float) -> None:
        """An intercept was answered."""
        killed = self._ticks[-1] if self._ticks else 0
        if during.first < self._back_at:
            self.waited += 1
            self.longest_wait = max(self.longest_wait, seconds)
        if during.first > killed:
            self.surely[answer] += 1
            self._back_at = min(self._back_at, during.last)
            self._back.set()
        else:
            self.perhaps[answer] += 1

    async def run(
        self,
        due: trio.MemoryReceiveChannel[None],
        statistics: Callable[[], Awaitable[PartitionStatistics]],
        rng: random.Random,
    ) -> None:
        """Kill the daemon once for each that is `due`, not before it has answered an intercept."""
        async for _ in due:
            await self._back.wait()
            await trio.sleep(rng.uniform(0, LONGEST_DELAY))
            said = await statistics()
            await trio.sleep(rng.uniform(0, LAST_MOMENTS))
            self.strike(said)

    def strike(self, said: PartitionStatistics) -> None:
        """Kill the daemon, which said so of its counters."""
        assert self._kill is not None, "it is somebody else's"
        self._back, self._back_at = trio.Event(), FOREVER
        self.surely.clear()
        self.perhaps.clear()
        self.lives.append(said)
        self._tally.kicked(None)
        self._tally.events.append("kill the daemon")
        self._ticks.append(self._clock.tick())
        self._kill()


class Schedule:
    """Which share of the exercise has to be over for each kill to be due."""

    def __init__(self, kills: int, rng: random.Random) -> None:
        self._shares = sorted((rng.uniform(*MIDDLE) for _ in range(kills)), reverse=True)

    def due(self, share: float) -> int:
        """How many more are due, once `share` is over."""
        due = 0
        while self._shares and self._shares[-1] <= share:
            self._shares.pop()
            due += 1
        return due


def share_over(*done_of: tuple[float, float]) -> float:
    """The largest share, of what was done and what there is to do."""
    return max(done / whole if whole < math.inf else 0.0 for done, whole in done_of)
