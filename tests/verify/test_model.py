"""Spin over the transition table: no order of steps breaks a promise, and each mutant breaks one.

Every generated mutant (a row, condition or effect left out) is detected by spin or by the running code.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from model.mutants import mutants, without_effect
from model.named_mutants import NAMED_MUTANTS, Mutant, attempts_on_replaced_memory_not_called_stale
from model.promela import Scope, model
from model.recorder import Trace
from model.running_code import problems, traces
from model.spin import Found, needs_spin, search
from model.transitions.promises import PROMISES
from model.transitions.table import DUE, OF_A_CHANGE, OF_MEMORY, OLD, OUTDATED
from model.transitions.terms import OfAll, Promise, Table, Within

pytestmark = [pytest.mark.verify, needs_spin]

SMALL = (
    Scope(pages=2, vps=1, sources=1, without=OF_MEMORY),
    Scope(pages=2, vps=1, sources=1, without=OF_A_CHANGE),
)
"""Large enough for every mutant below to be detected in one of them."""
NEITHER = OF_A_CHANGE | OF_MEMORY
WORLDS = (
    *((world, 200_000) for world in SMALL),
    (Scope(pages=2, vps=1, sources=1), 1_000_000),
    (Scope(pages=2, vps=2, sources=1, without=NEITHER), 1_000_000),
    (Scope(pages=2, vps=1, sources=2, without=NEITHER), 1_000_000),
    (Scope(pages=3, vps=1, sources=1, without=NEITHER), 1_000_000),
)
"""With the least states that each has. Changes of regions make four times as many, what is remembered five
times."""
MUTANTS = dict(mutants())
FOR_NAMED_MUTANTS = {
    "change: mistaken stays as it is",
    "change: each outdated stays as it is",
    "change: each misseen stays as it is",
    "recall: phase stays as it is",
}
"""The effects that only named mutants need: three remember which frames are no longer the VMM's; the fourth
has a "no" from memory told."""


def first_error(directory: Path, table: Table, promises: Sequence[Promise] = PROMISES) -> Found | None:
    """What spin finds in one of the small worlds."""
    searched = (search(model(world, table, promises), directory, optimise=0) for world in SMALL)
    return next((found for found in searched if found.errors), None)


@pytest.mark.parametrize(
    ("world", "states"),
    WORLDS,
    ids=[f"{world.pages} pages, {world.vps} VPs, {world.sources} sources" for world, _ in WORLDS],
)
def test_no_order_of_steps_breaks_a_promise(tmp_path: Path, world: Scope, states: int) -> None:
    found = search(model(world), tmp_path)
    print(f"\n{world}: {found}")
    assert found.errors == 0
    assert found.states > states, "the search has become another"


@pytest.mark.parametrize("mutant", NAMED_MUTANTS.values(), ids=NAMED_MUTANTS.keys())
def test_each_named_mutant_has_an_order_that_breaks_a_promise(tmp_path: Path, mutant: Mutant) -> None:
    found = first_error(tmp_path, mutant())
    print(f"\n{mutant.__name__}: {found}")
    assert found is not None
    assert found.broken


@pytest.fixture(scope="module")
def code_traces() -> list[Trace]:
    return traces(60)


@pytest.mark.parametrize("name", sorted(MUTANTS.keys() - FOR_NAMED_MUTANTS))
def test_each_generated_mutant_is_detected_by_the_code_or_by_spin(
    tmp_path: Path, code_traces: list[Trace], name: str
) -> None:
    table: Table = MUTANTS[name]
    if any(problems(trace, table) for trace in code_traces):
        return
    assert first_error(tmp_path, table), "allows too much, and was not detected"


def test_remembering_changes_finds_an_error_that_the_model_misses_without(
    tmp_path: Path,
) -> None:
    table = attempts_on_replaced_memory_not_called_stale()
    remembered = [effect for effect in table["change"].then if effect.variable is OUTDATED]
    assert len(remembered) == 1
    forgetful = without_effect(table, "change", remembered[0])
    of_old_frames = [promise for promise in PROMISES if promise.holds == Within(OLD, OfAll(DUE))]
    assert first_error(tmp_path, table, of_old_frames)
    assert first_error(tmp_path, forgetful, of_old_frames) is None
