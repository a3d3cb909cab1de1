"""A uid's share of the event loop's time: when its tasks must let others run, and when they go on.

Owns the bounds on a step and on a uid's part of a round, and whose turn is next. Must not know what the time
is spent on. Work that grows with what a client chooses asks after each piece whether the time is used up: the
clock bounds it, not a count, so it holds whatever a piece costs.
"""

from __future__ import annotations

from typing import Final

import trio

from interceptd.scheduling.step_monitor import SPENT, Spent, StepMonitor

SLICE_NS: Final = 2_000_000
"""What a step may take before it lets others run. The rest up to `STEP_LIMIT_NS` is for the last piece."""
ROUND_NS: Final = 5_000_000
"""What a uid's steps may take together in a round of the event loop; twice that with their last pieces."""


class TimeShare(Spent):
    """One uid's. Its tasks that wait for their turn continue in the order in which they began to wait."""

    __slots__ = ("_burst", "_monitor", "_turns", "_waiting")

    def __init__(self, monitor: StepMonitor, turns: Turns) -> None:
        super().__init__()
        self._monitor = monitor
        self._turns = turns
        self._waiting = trio.lowlevel.ParkingLot()
        self._burst = 1

    @property
    def used_up(self) -> bool:
        """Whether the running task, one of this uid's, should let others run."""
        monitor = self._monitor
        step = monitor.now() - monitor.step_began
        return step > SLICE_NS or (self.round == monitor.round and self.ns + step > ROUND_NS)

    @property
    def is_waited_for(self) -> bool:
        return bool(self._waiting)

    async def turn(self) -> None:
        """Block until it is this task's turn."""
        if self._turns.enter(self):
            await self._waiting.park()
        else:
            await trio.lowlevel.checkpoint()

    def release(self) -> None:
        """Let tasks go on: twice as many as the last time if those took little, else half as many."""
        self._burst = 2 * self._burst if self.ns < ROUND_NS // 2 else self._burst // 2
        self._burst = max(1, min(self._burst, len(self._waiting)))
        self._waiting.unpark(count=self._burst)

    def release_all(self) -> None:
        self._waiting.unpark_all()


class Turns:
    """Of the uids whose tasks wait, one has a turn per round of the event loop. `run` is its task."""

    def __init__(self, monitor: StepMonitor) -> None:
        self._monitor = monitor
        self._line: dict[TimeShare, None] = {}  # in the order of insertion
        self._any = trio.Event()
        self._running = False

    def share(self) -> TimeShare:
        """The share of another uid."""
        return TimeShare(self._monitor, self)

    def enter(self, share: TimeShare) -> bool:
        """Put a uid in the line. False if nobody gives turns, so that nobody need wait."""
        if self._running:
            self._line.setdefault(share)
            self._any.set()
        return self._running

    async def run(self) -> None:
        """Give turns until cancelled; then let all go on."""
        self._running = True
        try:
            while True:
                await self._any.wait()
                self._any = trio.Event()
                while self._line:
                    share = next(iter(self._line))
                    del self._line[share]
                    share.release()
                    if share.is_waited_for:
                        self._line[share] = None
                    await trio.lowlevel.checkpoint()
        finally:
            self._running = False
            for share in self._line:
                share.release_all()


async def give_way() -> None:
    """Let others run if the time is used up: a checkpoint only then. Call it between two pieces of work."""
    share = SPENT.get()
    if isinstance(share, TimeShare) and share.used_up:
        await share.turn()


async def give_way_shielded() -> None:
    """The same for work that must not be broken off half-way."""
    share = SPENT.get()
    if isinstance(share, TimeShare) and share.used_up:
        with trio.CancelScope(shield=True):
            await share.turn()
