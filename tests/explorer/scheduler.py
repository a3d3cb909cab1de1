"""Decides which actor runs next, one at a time.

Owns the points where actors stop, and the loop that releases one of them once no other can run. It also
takes from trio the coin that orders tasks which become ready together. Must not know what the actors do.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import trio
import trio._core._run as trio_run
from trio.testing import MockClock, wait_all_tasks_blocked

VMM = "VMM"
"""The actor that edits memory and regions."""
DAEMON = "daemon"
"""The actor of all unnamed tasks: the region manager, the end of the partition."""
TIME = "time"
"""The actor that represents a clock which advances while every actor is busy."""
PATIENCE = 3600.0
"""Virtual seconds, far above every timeout: only actors that wait for each other wait so long."""


class Chooser(Protocol):
    def choose(self, ready: Sequence[str], latest: str) -> str:
        """One of `ready`, which is not empty; `latest` went last."""


class Drawn:
    """Each actor is as likely as the next, but for a drawn reluctance to leave the one that runs."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._stay = rng.choice((0.0, 0.3, 0.6, 0.85))

    def choose(self, ready: Sequence[str], latest: str) -> str:
        if latest in ready and self._rng.random() < self._stay:
            return latest
        chosen = ready[int(self._rng.random() * len(ready))]
        if chosen == TIME and self._rng.random() < 0.8:  # timeouts are rare
            chosen = ready[0]
        return chosen


class Replayed:
    """Follow the choices of a trace while possible; then let each actor run as long as it can."""

    def __init__(self, trace: Sequence[str]) -> None:
        self._rest: Iterator[str] = iter(trace)

    def choose(self, ready: Sequence[str], latest: str) -> str:
        for name in self._rest:
            if name in ready:
                return name
        if latest in ready:
            return latest
        return next((name for name in ready if name != TIME), ready[0])


class Scheduler:
    """`order` are the actors' names; `look` is called after each step, when no actor runs."""

    def __init__(
        self, order: Sequence[str], chooser: Chooser, clock: MockClock, look: Callable[[], None]
    ) -> None:
        self.trace: list[str] = []
        self.latest = ""
        self.stuck: list[str] = []
        """The actors that were waiting for each other in the end."""
        self.timeout: float | None = None
        """How far the clock may jump, once, during an intercept; None if it may not."""
        self.acting: set[str] = set()
        """The scripted actors that have not finished; without any, no actor is stopped any more."""
        self._order = {name: place for place, name in enumerate((*order, DAEMON, TIME))}
        self._chooser = chooser
        self._clock = clock
        self._look = look
        self._names: dict[trio.lowlevel.Task, str] = {}
        self._stopped: dict[str, trio.lowlevel.Task] = {}
        self._stop = trio.Event()
        self._over = False

    @property
    def step(self) -> int:
        return len(self.trace)

    def name(self, name: str) -> None:
        """The task that calls this is the actor of that name from now on."""
        self._names[trio.lowlevel.current_task()] = name

    def current(self) -> str:
        return self._names.get(trio.lowlevel.current_task(), DAEMON)

    async def stop(self) -> None:
        """Stop until chosen. Cancelling is safe."""
        if not self.acting:
            return
        name = self.current()
        while name in self._stopped:  # two tasks of the daemon
            name += "'"
            self._order.setdefault(name, self._order[DAEMON])
        self._stopped[name] = trio.lowlevel.current_task()
        self._stop.set()

        def give_up(_: trio.lowlevel.RaiseCancelT) -> trio.lowlevel.Abort:
            if self._stopped.pop(name, None) is None:  # released already
                return trio.lowlevel.Abort.FAILED
            return trio.lowlevel.Abort.SUCCEEDED

        await trio.lowlevel.wait_task_rescheduled(give_up)

    def end(self) -> None:
        """Everybody is through: `run` returns."""
        self._over = True
        self._stop.set()

    async def run(self) -> None:
        """Release one actor after the other until `end`, or until none can run; then stop none any more."""
        try:
            await self._until_over()
        finally:
            self.acting.clear()
            for task in self._stopped.values():  # some are shielded, and would stop here forever
                trio.lowlevel.reschedule(task)
            self._stopped.clear()

    async def _until_over(self) -> None:
        while not self._over:
            await wait_all_tasks_blocked()
            self._look()
            if self._stopped:
                self._release(self._chooser.choose(self._ready(), self.latest))
            elif not self._over and not await self._somebody_stops():
                self.stuck = sorted(self.acting)
                return

    def _ready(self) -> list[str]:
        ready = sorted(self._stopped, key=self._order.__getitem__)
        return ready if self.timeout is None else [*ready, TIME]

    def _release(self, name: str) -> None:
        self.trace.append(name)
        self.latest = name
        if name == TIME:
            timeout, self.timeout = self.timeout, None
            self._clock.jump(timeout or 0.0)
        else:
            trio.lowlevel.reschedule(self._stopped.pop(name))

    async def _somebody_stops(self) -> bool:
        """Let time pass until an actor can run, or all have finished."""
        self._stop = trio.Event()
        with trio.move_on_after(PATIENCE):
            await self._stop.wait()
            return True
        return False


class _InOrder(random.Random):
    """Trio's coin: what becomes ready together runs in the order of the tasks' age, or in the other."""

    backwards = False

    def shuffle(self, x: list[object]) -> None:  # type: ignore[override] # trio has lists
        if not self.backwards:
            x.reverse()  # trio takes from the end


_COIN = _InOrder()


@contextmanager
def deterministic() -> Iterator[None]:
    """In here trio orders tasks by their age, so that a schedule is nothing but its choices.

    It is the switch that trio has for hypothesis; there is no public one.
    """
    before = trio_run._ALLOW_DETERMINISTIC_SCHEDULING, trio_run._r
    trio_run._ALLOW_DETERMINISTIC_SCHEDULING, trio_run._r = True, _COIN  # type: ignore[misc]
    try:
        yield
    finally:
        trio_run._ALLOW_DETERMINISTIC_SCHEDULING, trio_run._r = before  # type: ignore[misc]


def youngest_first(*, backwards: bool) -> None:
    """Which of the two orders the schedule at hand has."""
    _COIN.backwards = backwards
