"""The tables of tests/explorer/README.md: every variant in every scenario, and every mutant.

Owns their figures and their Markdown, which a test compares with the page. Must not know how a search goes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence, Set
from dataclasses import dataclass, replace
from functools import partial

from .mutants import MUTANTS
from .rules import Rule
from .scenarios import SCENARIOS
from .search import Explorer, Failure, exploring
from .variants import CORES, MUTANT_VARIANTS, PATCH_V0, PATCH_V3, Variant

SCHEDULES = 100
"""Of each scenario, for a table."""
MOST_PER_MUTANT = 10_000
"""Schedules, over all scenarios, within which each mutant must be found."""


@dataclass(frozen=True)
class Hunted:
    """A mutant and its first failure, if one was found; `tried` counts the schedules of all scenarios."""

    variant: Variant
    failure: Failure | None


def variants_table(schedules: int, watching: Callable[[str], None]) -> str:
    """Scenario by scenario: each rule that is broken, with the number of the first schedule that does."""
    columns = (PATCH_V0, PATCH_V3, *CORES)
    cells = {variant.name: _cells(variant, schedules, watching) for variant in columns}
    return _markdown(
        ["scenario", *(variant.name for variant in columns)],
        ([f"`{name}`", *(cells[variant.name][name] for variant in columns)] for name in SCENARIOS),
    )


def mutants_table(watching: Callable[[str], None]) -> str:
    """One row per mutant: what it does, and which rule found it."""
    rows = []
    for name, hunted in zip(MUTANTS, hunted_mutants(watching), strict=True):
        failure = hunted.failure
        found = (
            f"none in {MOST_PER_MUTANT}"
            if failure is None
            else f"{failure.finding.rule.name} in `{failure.scenario}` after {failure.tried}"
        )
        rows.append([f"`{name}`", hunted.variant.about, found])
    return _markdown(["mutant", "what it does", "found by"], rows)


def rules_table() -> str:
    return _markdown(
        ["rule", "invariant", "hazards", "what was seen"],
        ([rule.name, rule.invariant, rule.hazards or "-", rule.sentence] for rule in Rule),
    )


def scenarios_table() -> str:
    return _markdown(
        ["scenario", "what happens"], ([f"`{each.name}`", each.about] for each in SCENARIOS.values())
    )


def hunted_mutants(
    watching: Callable[[str], None], variants: Sequence[Variant] = MUTANT_VARIANTS
) -> list[Hunted]:
    """For each variant the first failure, its schedules taken from all scenarios in turn."""
    hunted = []
    for variant in variants:
        watching(variant.name)
        hunted.append(Hunted(variant, exploring(variant.build, partial(_first_failure, variant.rules))))
    return hunted


async def _first_failure(rules: Set[Rule], explorer: Explorer) -> Failure | None:
    while explorer.schedules < MOST_PER_MUTANT:
        number = explorer.schedules // len(SCENARIOS)
        for scenario in SCENARIOS.values():
            for rule, failure in (await explorer.numbered(scenario, number)).items():
                if rule not in rules:
                    continue
                return replace(failure, tried=explorer.schedules)
    return None


def _cells(variant: Variant, schedules: int, watching: Callable[[str], None]) -> dict[str, str]:
    async def search(explorer: Explorer) -> dict[str, str]:
        cells = {}
        for scenario in SCENARIOS.values():
            watching(f"{variant.name}: {scenario.name}")
            if not variant.applies_to(scenario):
                cells[scenario.name] = "not applicable"
                continue
            failures = await explorer.first_of_each(scenario, 0, schedules)
            found = ", ".join(f"{rule.name} {failure.tried}" for rule, failure in failures.items())
            cells[scenario.name] = found or f"none in {schedules}"
        return cells

    return exploring(variant.build, search)


def _markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
