"""Running a schedule again, by number or by choices, gives the same result."""

from __future__ import annotations

import random

import pytest
import trio
import trio._core._run as trio_run

from explorer.report import Explored, StoryLine, explored, told
from explorer.rules import Rule
from explorer.scenarios import SCENARIOS
from explorer.search import Explorer, Failure, exploring
from explorer.shrink import shortest
from explorer.variants import PATCH_V0, PATCH_V3, VARIANTS, Variant

UNMAP = SCENARIOS["two-vps-and-an-unmap"]
RARE = VARIANTS["core-without-being-mapped-slot"]


def first_failures(variant: Variant) -> dict[Rule, Failure]:
    async def search(explorer: Explorer) -> dict[Rule, Failure]:
        return await explorer.first_of_each(UNMAP, 0, 20)

    return exploring(variant.build, search)


def report(seed: int, schedules: int) -> Explored:
    return explored(PATCH_V3, [UNMAP], seed=seed, schedules=schedules, watching=lambda _: None)


@pytest.mark.parametrize("variant", [PATCH_V0, RARE], ids=lambda variant: variant.name)
def test_the_same_numbers_find_the_same_failures_by_the_same_choices(variant: Variant) -> None:
    found = first_failures(variant)
    assert found
    assert first_failures(variant) == found


def test_a_failure_is_found_again_by_its_choices() -> None:
    async def again(explorer: Explorer) -> tuple[object, object]:
        failure = (await explorer.first_of_each(UNMAP, 0, 20))[Rule.LEFT]
        outcomes = await explorer.again(failure.schedule)
        return failure.finding, outcomes.findings[Rule.LEFT]

    found, found_again = exploring(PATCH_V3.build, again)
    assert found == found_again


def test_recovery_is_judged_in_the_schedules_it_is_wanted_in_and_in_a_replay() -> None:
    """No replay may miss what a search has found."""
    scenario = SCENARIOS["remove-and-add-again"]

    async def every(explorer: Explorer) -> list[Failure | None]:
        return [(await explorer.numbered(scenario, seed)).get(Rule.UNLOGGED) for seed in range(8)]

    async def again(explorer: Explorer) -> list[bool]:
        found = [failure for failure in await every(explorer) if failure is not None]
        return [Rule.UNLOGGED in (await explorer.again(each.schedule)).findings for each in found]

    broken = VARIANTS["core-without-unmaps-recorded"].build
    all_of_them = exploring(broken, every)
    assert any(all_of_them[1::2])
    assert exploring(broken, every, recovery_every=2) == [
        None if seed % 2 else each for seed, each in enumerate(all_of_them)
    ]
    replayed = exploring(broken, again, recovery_every=8)
    assert replayed == [True] * len(replayed)


def test_a_shortened_failure_breaks_the_same_rule_in_fewer_steps() -> None:
    async def both(explorer: Explorer) -> tuple[Failure, Failure]:
        failure = (await explorer.first_of_each(UNMAP, 0, 20))[Rule.LEFT]
        return failure, await shortest(explorer, failure)

    found, short = exploring(PATCH_V3.build, both)
    assert short.finding.rule is Rule.LEFT
    assert len(short.schedule.trace) < len(found.schedule.trace)


def test_the_same_seed_gives_the_same_stories() -> None:
    told_first = report(0, 10)
    assert told_first.counterexamples
    assert report(0, 10) == told_first


def test_the_printed_seed_reproduces_the_story() -> None:
    [left] = [each for each in report(0, 20).counterexamples if each.rule == "LEFT"]
    [again] = [each for each in report(left.seed, 1).counterexamples if each.rule == "LEFT"]
    assert again == left


def test_repeated_lines_are_printed_once() -> None:
    block = [StoryLine("vmm", "VP 0: reads gfn 1: intercept"), StoryLine("daemon", "VP 0: has mapped gfn 1")]
    end = StoryLine("vmm", "VP 0: gets fail")
    assert told([*block * 9, end]) == [*block, StoryLine("vmm", "... the last 2 lines, 8 times more"), end]


def test_after_an_exploration_trio_orders_tasks_as_before() -> None:
    before = trio_run._ALLOW_DETERMINISTIC_SCHEDULING, trio_run._r
    first_failures(PATCH_V3)
    assert (trio_run._ALLOW_DETERMINISTIC_SCHEDULING, trio_run._r) == before
    assert isinstance(trio_run._r, random.Random)


def test_trio_still_has_the_switch_that_makes_it_deterministic() -> None:
    """There is no public one: check the source of trio before changing its version."""
    assert trio.__version__.split(".")[0] == "0"
    assert isinstance(trio_run._ALLOW_DETERMINISTIC_SCHEDULING, bool)
