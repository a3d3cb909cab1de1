"""Runs schedules until a rule is broken or enough have been tried.

Owns the numbering of schedules: number n of a scenario is always the same. Must not know variants by name.
"""

from __future__ import annotations

import gc
import logging
import random
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

import structlog
import trio
from trio.testing import MockClock

from . import run
from .rules import Finding, Rule
from .run import Outcomes
from .scenarios import Scenario
from .scheduler import Chooser, Drawn, Replayed, deterministic
from .script import Script
from .system_under_test import Build
from .timeline import Story

SILENT = Story(wanted=False)
YOUNG_OBJECTS = 50_000
"""Between two collections: 6 MB and some 30 schedules. With Python's 700 they took a tenth of the time."""
Result = TypeVar("Result")


@dataclass(frozen=True)
class Schedule:
    """A script and the choices of who goes next: all that a run depends on."""

    play: Script
    trace: tuple[str, ...]
    backwards: bool


@dataclass(frozen=True)
class Failure:
    """A rule that schedule number `seed` of a scenario breaks; it is the `tried`-th that was run."""

    scenario: str
    seed: int
    tried: int
    finding: Finding
    schedule: Schedule


class Explorer:
    """Runs schedules of one variant; made by `exploring`. I11 is judged in those whose number is a multiple
    of `recovery_every`, and in all that are run again."""

    def __init__(self, build: Build, clock: MockClock, recovery_every: int = 1) -> None:
        self._build = build
        self._clock = clock
        self._recovery_every = recovery_every
        self.schedules = 0
        """Run so far."""

    async def numbered(self, scenario: Scenario, seed: int) -> dict[Rule, Failure]:
        """Run schedule number `seed`: the first failure of each rule."""
        rng = random.Random(f"{scenario.name} {seed}")
        play, backwards = scenario.draw(rng), rng.random() < 0.5
        judges_recovery = seed % self._recovery_every == 0
        outcomes = await self._run(
            play, Drawn(rng), SILENT, backwards=backwards, judges_recovery=judges_recovery
        )
        return {
            rule: Failure(
                scenario.name,
                seed,
                1,
                finding,
                Schedule(play, tuple(outcomes.trace[: finding.step]), backwards),
            )
            for rule, finding in outcomes.findings.items()
        }

    async def first_of_each(self, scenario: Scenario, seed: int, schedules: int) -> dict[Rule, Failure]:
        """The first failure of each rule among the schedules from number `seed` on."""
        failures: dict[Rule, Failure] = {}
        for tried in range(1, schedules + 1):
            for rule, failure in (await self.numbered(scenario, seed + tried - 1)).items():
                failures.setdefault(rule, replace(failure, tried=tried))
        return failures

    async def again(self, schedule: Schedule, story: Story = SILENT) -> Outcomes:
        """Run a schedule by its choices."""
        return await self._run(schedule.play, Replayed(schedule.trace), story, backwards=schedule.backwards)

    async def _run(
        self, play: Script, chooser: Chooser, story: Story, *, backwards: bool, judges_recovery: bool = True
    ) -> Outcomes:
        self.schedules += 1
        return await run.play(
            play,
            self._build,
            chooser,
            self._clock,
            story,
            backwards=backwards,
            judges_recovery=judges_recovery,
        )


def exploring(
    build: Build, search: Callable[[Explorer], Awaitable[Result]], *, recovery_every: int = 1
) -> Result:
    """Search in a trio run with a jumping clock, with the daemon's log disabled."""
    clock = MockClock(autojump_threshold=0)
    with deterministic(), _silence(), _little_garbage_collected():
        return trio.run(partial(search, Explorer(build, clock, recovery_every)), clock=clock)


@contextmanager
def _silence() -> Iterator[None]:
    """The daemon's events would be those of thousands of partitions."""
    before = structlog.get_config()
    structlog.configure(
        wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL), processors=[_drop]
    )
    try:
        yield
    finally:
        structlog.configure(**before)


def _drop(_: object, __: str, ___: structlog.typing.EventDict) -> structlog.typing.EventDict:
    raise structlog.DropEvent


@contextmanager
def _little_garbage_collected() -> Iterator[None]:
    """A schedule leaves a partition of cycles behind; all that was there before need not be walked for it,
    and what is there need not be walked several times a schedule."""
    before = gc.get_threshold()
    gc.freeze()
    gc.set_threshold(YOUNG_OBJECTS, *before[1:])
    try:
        yield
    finally:
        gc.set_threshold(*before)
        gc.unfreeze()
