"""A uid's share of the event loop's time: when its tasks must let others run, and when they go on.

Owns the bound on a uid's part of a round, and whose turn is next. Must not know what the time is spent on.
Work whose length a client chooses asks after each piece whether the time is used up. The clock bounds it, not
a count, so the bound holds whatever a piece costs.
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
"""Nanoseconds of a round of the event loop after which long work waits for its turn, while there are other
uids."""
YOUNG_ROUND_NS: Final = 200_000
"""Nanoseconds of a round of the event loop in which requests that have no turn may still be carried out."""
LONELY_ROUND_NS: Final = 4_000_000
"""The same for a uid that is the only one."""


class TimeShare:
    """One uid's. Its tasks that wait for their turn continue in the order in which they began to wait."""

    __slots__ = (
        "_began",
        "_burst",
        "_monitor",
        "_next_burst_in",
        "_now",
        "_round",
        "_turns",
        "_waiting",
        "_whole_slice_in",
    )

    def __init__(self, monitor: StepMonitor, turns: TimeShares) -> None:
        self._monitor = monitor
        self._now = monitor.now
        self._turns = turns
        self._round = 0
        self._began = monitor.now()
        """When the task that runs in `_round` began, as far as it is known."""
        self._whole_slice_in = -1
        """The round in which the running task has its whole slice, however long the round is."""
        self._waiting = trio.lowlevel.ParkingLot()
        self._burst = 0
        self._next_burst_in = 0
        """The round from which on the length of the last burst's round is known."""

    @property
    def used_up(self) -> bool:
        """Whether the running task, one of this uid's, should let others run."""
        if self._round != self._monitor.round:
            self._round, self._began = self._monitor.round, self._monitor.began
        now = self._now()
        if self._whole_slice_in == self._round:
            return now - self._began > SLICE_NS
        return now - self._began > SLICE_NS or now - self._monitor.began > self._turns.round_ns

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
        is_first = self._round != self._monitor.round
        self._round, self._began = self._monitor.round, self._now()
        self._whole_slice_in = self._round if is_first else -1

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


class TimeShares:
    """Of the uids whose tasks wait, one has a turn per round of the event loop. `run` is its task."""

    def __init__(self, monitor: StepMonitor) -> None:
        self.monitor = monitor
        self._line: dict[TimeShare, None] = {}  # in the order of insertion
        self._any = trio.Event()
        self.nursery: trio.Nursery | None = None
        """For tasks that serve a uid and not a connection; None while no turns are given."""
        self.round_ns = LONELY_ROUND_NS
        """Nanoseconds of a round after which long work waits for its turn."""

    def share(self) -> TimeShare:
        """The share of another uid."""
        return TimeShare(self.monitor, self)

    def set_uids(self, count: int) -> None:
        """So many uids have connections."""
        self.round_ns = LONELY_ROUND_NS if count <= 1 else SHARED_ROUND_NS

    def one_per_round(self) -> OnePerRound:
        return OnePerRound(self.monitor)

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
                        before = self.monitor.round
                        self._give_turn()
                        await trio.lowlevel.checkpoint()
                        if self.monitor.round == before:  # nobody counts the rounds any more
                            self._let_all_go()
            finally:
                self.nursery = None
                self._let_all_go()

    def _let_all_go(self) -> None:
        for share in self._line:
            share.release_all()
        self._line.clear()

    def _give_turn(self) -> None:
        share = next(iter(self._line))
        del self._line[share]
        share.release()
        if share.is_waited_for:
            self._line[share] = None


class OnePerRound:
    """A gate that one task passes in each round of the event loop, in the order of arrival, and more while
    the round is young: a round for each would take as long as what most of them ask."""

    def __init__(self, monitor: StepMonitor) -> None:
        self._monitor = monitor
        self._lock = EagerLock()
        self._passed_in = -1

    def enter_nowait(self) -> bool:
        """Pass if nobody waits, and nobody has passed in this round or it has only begun."""
        if self._lock.locked():
            return False
        monitor = self._monitor
        if self._passed_in == monitor.round and monitor.now() - monitor.began > YOUNG_ROUND_NS:
            return False
        self._passed_in = monitor.round
        return True

    async def enter(self) -> None:
        """Block until it is this task's turn; not at all where `enter_nowait` passes."""
        if not self.enter_nowait():
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
