"""The results of an exploration, as values.

Owns the search for a counterexample of each rule that a variant breaks, and what a counterexample says. Must
not know how it is shown.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import msgspec

from .rules import Rule
from .scenarios import Scenario
from .search import Explorer, Failure, exploring
from .shrink import shortest
from .timeline import Line, Side, Story
from .variants import Variant

MOST_TOLD = 3
"""How often the same lines are printed in a row before they are summarised."""


class StoryLine(msgspec.Struct, frozen=True):
    """`side` is `vmm` or `daemon`."""

    side: str
    text: str


class Counterexample(msgspec.Struct, frozen=True, kw_only=True):
    """The shortest schedule found that breaks a rule. `again` is the command line that finds it again."""

    rule: str
    invariant: str
    hazards: str
    sentence: str
    variant: str
    scenario: str
    seed: int
    given: list[str]
    story: list[StoryLine]
    end: str
    again: str


class Explored(msgspec.Struct, frozen=True, kw_only=True):
    """One variant's exploration: `found` has the number of the first schedule for each scenario and rule."""

    variant: str
    about: str
    schedules: int
    found: dict[str, dict[str, int]]
    counterexamples: list[Counterexample]


def explored(
    variant: Variant,
    scenarios: Sequence[Scenario],
    *,
    seed: int,
    schedules: int,
    watching: Callable[[str], None],
    recovery_every: int = 1,
) -> Explored:
    """Run so many schedules of each scenario that applies, and shrink a failure of each rule. I11 is judged
    in one of `recovery_every`."""

    async def search(explorer: Explorer) -> Explored:
        failures: list[Failure] = []
        found: dict[str, dict[str, int]] = {}
        for scenario in scenarios:
            if not variant.applies_to(scenario):
                continue
            watching(scenario.name)
            firsts = await explorer.first_of_each(scenario, seed, schedules)
            found[scenario.name] = {rule.name: failure.tried for rule, failure in firsts.items()}
            failures += firsts.values()
        searched = explorer.schedules
        watching("shortening")
        examples = [
            await _counterexample(explorer, variant, [each for each in failures if each.finding.rule is rule])
            for rule in Rule
            if any(each.finding.rule is rule for each in failures)
        ]
        return Explored(
            variant=variant.name,
            about=variant.about,
            schedules=searched,
            found=found,
            counterexamples=examples,
        )

    return exploring(variant.build, search, recovery_every=recovery_every)


async def _counterexample(
    explorer: Explorer, variant: Variant, failures: Sequence[Failure]
) -> Counterexample:
    """Of the first scenario that breaks the rule, and of the one that does in fewest steps, the shorter."""
    likely = {id(each): each for each in (failures[0], min(failures, key=_steps))}
    failure = min([await shortest(explorer, each) for each in likely.values()], key=_steps)
    story = Story(wanted=True)
    await explorer.again(failure.schedule, story)
    rule, finding = failure.finding.rule, failure.finding
    return Counterexample(
        rule=rule.name,
        invariant=rule.invariant,
        hazards=rule.hazards,
        sentence=rule.sentence,
        variant=variant.name,
        scenario=failure.scenario,
        seed=failure.seed,
        given=story.given,
        story=told([_line(line) for line in story.up_to(finding.step)]),
        end=finding.how,
        again=f"python -m explorer --variant {variant.name} --scenario {failure.scenario}"
        f" --seed {failure.seed} --schedules 1",
    )


def _steps(failure: Failure) -> int:
    return failure.finding.step


def _line(line: Line) -> StoryLine:
    return StoryLine("vmm" if line.side is Side.VMM else "daemon", str(line))


def told(lines: list[StoryLine]) -> list[StoryLine]:
    """The lines, with what comes again and again told once."""
    for start in (n for n, line in enumerate(lines) if line.text.endswith("intercept")):
        for length in range(1, (len(lines) - start) // 2 + 1):
            block = lines[start : start + length]
            times = 1
            while lines[start + times * length : start + (times + 1) * length] == block:
                times += 1
            if times > MOST_TOLD:
                again = StoryLine(block[0].side, f"... the last {length} lines, {times - 1} times more")
                return [*lines[: start + length], again, *lines[start + times * length :]]
    return lines
