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
from interceptd.scheduling.step_monitor import StepMonitor

SLICE_NS: Final = 500_000
"""Nanoseconds that a task may take before it lets others run."""
SHARED_ROUND_NS: Final = 1_000_000
"""Nanoseconds of a round of the event loop after which the tasks of a uid wait for their turn, while there
are other uids. The first few of each uid go on all the same."""
LONELY_ROUND_NS: Final = 4_000_000
"""The same for a uid that is the only one: hundreds of its VPs may be answered in one round."""
SHARED_ROUNDS: Final = 64
"""Rounds after which another uid is no longer considered to be there."""
FIRST_FEW: Final = 8
"""Connections of a uid that wake up in a round before it looks at the clock, which costs something."""


class TimeShare:
    """One uid's. Its tasks that wait for their turn continue in the order in which they began to wait."""

    __slots__ = (
        "_began",
        "_burst",
        "_granted_in",
        "_monitor",
        "_next_burst_in",
        "_now",
        "_over",
        "_round",
        "_turns",
        "_waiting",
        "_woken",
    )

    def __init__(self, monitor: StepMonitor, turns: Turns) -> None:
        self._monitor = monitor
        self._now = monitor.now
        self._turns = turns
        self._round = 0
        self._woken = 0
        self._over = False
        """In `_round`: how many connections woke up, and whether any more must wait."""
        self._began = monitor.now()
        """When the running task began, as far as it is known."""
        self._granted_in = -1
        """The last round in which a task had its turn."""
        self._waiting = trio.lowlevel.ParkingLot()
        self._burst = 0
        self._next_burst_in = 0
        """The round from which on the length of the last burst's round is known."""

    def wake(self) -> bool:
        """A connection of this uid wakes up. Returns whether it should wait for its turn."""
        if self._round != self._monitor.round:
            self._enter_round()
            return False
        self._woken += 1
        if self._woken % FIRST_FEW == 0 and not self._over:
            self._over = self._now() - self._monitor.began > self._turns.round_ns
        return self._over

    def begin(self) -> None:
        """The running task begins a step that is worth measuring, until `rest`."""
        self._began = self._now()

    def rest(self) -> None:
        """It is about to wait. One that has waited elsewhere since its `begin` is not measured."""
        if self._round == self._monitor.round:
            now = self._now()
            self._monitor.step_ended(now, now - self._began)

    @property
    def used_up(self) -> bool:
        """Whether the running task, one of this uid's, should let others run."""
        if self._round != self._monitor.round:
            self._enter_round()
        now = self._now()
        if self._granted_in == self._round:
            return now - self._began > SLICE_NS
        return now - self._began > SLICE_NS or now - self._monitor.began > self._turns.round_ns

    def _enter_round(self) -> None:
        self._round, self._woken, self._over = self._monitor.round, 0, False
        self._began = self._monitor.began
        self._turns.enter_round(self)

    @property
    def is_waited_for(self) -> bool:
        return bool(self._waiting)

    async def turn(self) -> None:
        """Block until it is this task's turn, even if cancelled: it comes within a few rounds."""
        if self._turns.enter(self):
            with trio.CancelScope(shield=True):
                await self._waiting.park()
        else:
            await trio.lowlevel.cancel_shielded_checkpoint()
        self.wake()
        self._granted_in = self._round
        self.begin()

    def release(self) -> None:
        """Let tasks go on: twice as many as the last time if their round was short, else half as many. Does
        nothing while that is not known."""
        if self._monitor.round < self._next_burst_in:
            return
        short = self._monitor.last_round_ns < self._turns.round_ns // 2
        self._burst = 2 * self._burst if short else self._burst // 2
        self._burst = max(1, min(self._burst, len(self._waiting)))
        self._next_burst_in = self._monitor.round + 2
        self._waiting.unpark(count=self._burst)

    def release_all(self) -> None:
        self._waiting.unpark_all()


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
