"""Schedule after schedule, until a rule is broken or enough have been tried.

Owns the numbering of schedules: number n of a scenario is always the same. Must not know variants by name.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import structlog
import trio
from trio.testing import MockClock

from . import run
from .rules import Finding, Rule
from .run import Outcomes
from .scenarios import Scenario
from .scheduler import Chooser, Drawn, Replayed, deterministic
from .script import Script
from .story import Story
from .subject import Build

SILENT = Story(wanted=False)


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
    """Runs schedules of one variant inside `exploring`."""

    def __init__(self, build: Build, clock: MockClock) -> None:
        self._build = build
        self._clock = clock
        self.schedules = 0

    async def numbered(self, scenario: Scenario, seed: int) -> tuple[Schedule, Outcomes]:
        """Run schedule number `seed`."""
        rng = random.Random(f"{scenario.name} {seed}")
        play, backwards = scenario.draw(rng), rng.random() < 0.5
        outcomes = await self._run(play, Drawn(rng), SILENT, backwards=backwards)
        return Schedule(play, tuple(outcomes.trace), backwards), outcomes

    async def again(self, schedule: Schedule, story: Story = SILENT) -> Outcomes:
        return await self._run(
            schedule.play, Replayed(schedule.trace), story, backwards=schedule.backwards
        )

    async def first_of_each(
        self, scenario: Scenario, seed: int, schedules: int, enough: Callable[[set[Rule]], bool]
    ) -> dict[Rule, Failure]:
        """The first failure of each rule among so many schedules, or until it is `enough`."""
        failures: dict[Rule, Failure] = {}
        for tried in range(1, schedules + 1):
            number = seed + tried - 1
            schedule, outcomes = await self.numbered(scenario, number)
            for rule, finding in outcomes.findings.items():
                if rule not in failures:
                    trace = schedule.trace[: finding.step]
                    failures[rule] = Failure(
                        scenario.name, number, tried, finding, replace(schedule, trace=trace)
                    )
            if outcomes.findings and enough(set(failures)):
                break
        return failures

    async def _run(self, play: Script, chooser: Chooser, story: Story, *, backwards: bool) -> Outcomes:
        self.schedules += 1
        return await run.play(play, self._build, chooser, self._clock, story, backwards=backwards)


@contextmanager
def quiet() -> Iterator[None]:
    """The daemon's log says nothing in here: its events are those of thousands of partitions."""
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
