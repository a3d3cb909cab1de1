"""A uid's share of the event loop's time: when its tasks must let others run, and when they go on.

Owns the bound on a uid's part of a round, and whose turn is next. Must not know what the time
is spent on. Work that grows with what a client chooses asks after each piece whether the time is used up: the
clock bounds it, not a count, so it holds whatever a piece costs.
"""

from __future__ import annotations

from contextvars import ContextVar
from typing import Final

import trio

from interceptd.eager_lock import EagerLock
from interceptd.scheduling.step_monitor import STEP_LIMIT_NS, StepMonitor

SLICE_NS: Final = 500_000
"""Nanoseconds that a task may take before it lets others run."""
SHARED_ROUND_NS: Final = 1_000_000
"""Nanoseconds that a uid's tasks may take together in a round of the event loop while there are other uids;
the rest of them wait for their turn."""
LONELY_ROUND_NS: Final = 4_000_000
"""The same for a uid that is the only one: hundreds of its VPs may be answered in one round."""
SHARED_ROUNDS: Final = 64
"""Rounds after which another uid is no longer considered to be there."""


class TimeShare:
    """One uid's. Its tasks that wait for their turn continue in the order in which they began to wait.

    What they take is measured where it costs little: from a connection's wake-up to its next wait.
    """

    __slots__ = (
        "_began",
        "_burst",
        "_monitor",
        "_now",
        "_released",
        "_round",
        "_taken",
        "_turns",
        "_waiting",
    )

    def __init__(self, monitor: StepMonitor, turns: Turns) -> None:
        self._monitor = monitor
        self._now = monitor.now
        self._turns = turns
        self._round = 0
        self._taken = 0
        """In `_round`, without what has been taken since `_began`."""
        self._began = monitor.now()
        self._waiting = trio.lowlevel.ParkingLot()
        self._burst = 0
        self._released = 0
        """Tasks that were let go on and have not run yet."""

    def wake(self) -> bool:
        """A task of this uid runs from now on. Returns whether it should wait for its turn."""
        self._began = self._now()
        if self._round != self._monitor.round:
            self._round, self._taken = self._monitor.round, 0
            self._turns.enter_round(self)
        return self._taken > self._turns.round_ns

    def rest(self) -> None:
        """It is about to wait. One that has waited elsewhere since its `wake` is not measured."""
        if self._round != self._monitor.round:
            return
        now = self._now()
        took = now - self._began
        self._taken += took
        self._began = now
        if took > STEP_LIMIT_NS:
            self._monitor.step_ended(now, took)

    @property
    def used_up(self) -> bool:
        """Whether the running task, one of this uid's, should let others run."""
        if self._round != self._monitor.round:
            return self.wake()
        step = self._now() - self._began
        return step > SLICE_NS or self._taken + step > self._turns.round_ns

    @property
    def is_waited_for(self) -> bool:
        return bool(self._waiting)

    async def turn(self) -> None:
        """Block until it is this task's turn, even if cancelled: it comes within a few rounds."""
        self.rest()
        if self._turns.enter(self):
            with trio.CancelScope(shield=True):
                await self._waiting.park()
            self._released -= 1
        else:
            await trio.lowlevel.cancel_shielded_checkpoint()
        self.wake()

    def release(self) -> None:
        """Let tasks go on: twice as many as the last time if those took little, else half as many. Does
        nothing before those have run."""
        if self._released:
            return
        self._burst = 2 * self._burst if self._taken < self._turns.round_ns // 2 else self._burst // 2
        self._burst = max(1, min(self._burst, len(self._waiting)))
        self._let_go(self._burst)

    def release_all(self) -> None:
        self._let_go(len(self._waiting))

    def _let_go(self, count: int) -> None:
        self._released += len(self._waiting.unpark(count=count))


class Turns:
    """Of the uids whose tasks wait, one has a turn per round of the event loop. `run` is its task."""

    def __init__(self, monitor: StepMonitor) -> None:
        self.monitor = monitor
        self._line: dict[TimeShare, None] = {}  # in the order of insertion
        self._any = trio.Event()
        self.nursery: trio.Nursery | None = None
        """For tasks that serve a uid and not a connection; None while no turns are given."""
        self.round_ns = LONELY_ROUND_NS
        """What a uid's tasks may take together in this round."""
        self._latest: TimeShare | None = None
        self._shared_until = 0

    def share(self) -> TimeShare:
        """The share of another uid."""
        return TimeShare(self.monitor, self)

    def one_per_round(self) -> OnePerRound:
        return OnePerRound(self.monitor)

    def enter_round(self, share: TimeShare) -> None:
        """A uid's first task of this round runs."""
        if share is not self._latest:
            if self._latest is not None:
                self._shared_until = self.monitor.round + SHARED_ROUNDS
            self._latest = share
        self.round_ns = SHARED_ROUND_NS if self.monitor.round < self._shared_until else LONELY_ROUND_NS

    def enter(self, share: TimeShare) -> bool:
        """Put a uid in the line. False if nobody gives turns, so that nobody need wait."""
        if self.nursery is None:
            return False
        self._line.setdefault(share)
        self._any.set()
        return True

    async def run(self) -> None:
        """Give turns until cancelled; then let all go on."""
        async with trio.open_nursery() as nursery:
            self.nursery = nursery
            try:
                while True:
                    await self._any.wait()
                    self._any = trio.Event()
                    while self._line:
                        self._give_turn()
                        await trio.lowlevel.checkpoint()
            finally:
                self.nursery = None
                for share in self._line:
                    share.release_all()

    def _give_turn(self) -> None:
        share = next(iter(self._line))
        del self._line[share]
        share.release()
        if share.is_waited_for:
            self._line[share] = None


class OnePerRound:
    """A gate that one task passes in each round of the event loop, in the order of arrival."""

    def __init__(self, monitor: StepMonitor) -> None:
        self._monitor = monitor
        self._lock = EagerLock()
        self._passed_in = -1

    async def enter(self) -> None:
        """Block until it is this task's turn; not at all if nobody has passed in this round."""
        if self._lock.locked() or self._passed_in == self._monitor.round:
            async with self._lock:
                await trio.lowlevel.checkpoint()
        self._passed_in = self._monitor.round


SHARE: ContextVar[TimeShare | None] = ContextVar("time_share", default=None)
"""Of the running task. A task inherits it from the one that starts it."""


async def give_way() -> None:
    """Let others run if the time is used up: a checkpoint only then. Call it between two pieces of work."""
    share = SHARE.get()
    if share is not None and share.used_up:
        await share.turn()
        await trio.lowlevel.checkpoint_if_cancelled()


async def give_way_shielded() -> None:
    """The same for work that must not be broken off half-way."""
    share = SHARE.get()
    if share is not None and share.used_up:
        await share.turn()
