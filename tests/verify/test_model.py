"""Spin over the transition table: no order of steps breaks a promise, and each mutant breaks one.

Every generated mutant (a row, condition or effect left out) is detected by spin or by the running code.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from model.mutants import edited, mutants
from model.named_mutants import NAMED_MUTANTS, Mutant, attempts_on_replaced_memory_not_called_stale
from model.promela import Scope, model
from model.recorder import Trace
from model.running_code import problems, traces
from model.spin import needs_spin, search
from model.transitions.promises import PROMISES
from model.transitions.table import BACKED, DUE, OF_A_CHANGE, OLD, OUTDATED
from model.transitions.terms import OfAll, Table, Within

pytestmark = [pytest.mark.verify, needs_spin]

SMALL = Scope(pages=2, vps=1, sources=1)
"""Large enough for every mutant below to be detected."""
WORLDS = (
    (SMALL, 200_000),
    (Scope(pages=2, vps=2, sources=1, without=OF_A_CHANGE), 1_000_000),
    (Scope(pages=2, vps=1, sources=2, without=OF_A_CHANGE), 1_000_000),
    (Scope(pages=3, vps=1, sources=1, without=OF_A_CHANGE), 1_000_000),
)
"""With the least states that each has. Changes of regions make four times as many."""
MUTANTS = dict(mutants())
MEMORY = "change: each outdated stays as it is"
"""The one effect that only a named mutant needs: it remembers which frames are no longer the VMM's."""


@pytest.mark.parametrize(("world", "states"), WORLDS, ids=str)
def test_no_order_of_steps_breaks_a_promise(tmp_path: Path, world: Scope, states: int) -> None:
    found = search(model(world), tmp_path)
    print(f"\n{world}: {found}")
    assert found.errors == 0
    assert found.states > states, "the search has become another"


@pytest.mark.parametrize("mutant", NAMED_MUTANTS.values(), ids=NAMED_MUTANTS.keys())
def test_each_named_mutant_has_an_order_that_breaks_a_promise(tmp_path: Path, mutant: Mutant) -> None:
    found = search(model(SMALL, mutant()), tmp_path, optimise=0)
    print(f"\n{mutant.__name__}: {found}")
    assert found.errors
    assert found.broken


@pytest.fixture(scope="module")
def code_traces() -> list[Trace]:
    return traces(60)


@pytest.mark.parametrize("name", [name for name in MUTANTS if name != MEMORY])
def test_each_generated_mutant_is_detected_by_the_code_or_by_spin(
    tmp_path: Path, code_traces: list[Trace], name: str
) -> None:
    table: Table = MUTANTS[name]
    if any(problems(trace, table) for trace in code_traces):
        return
    assert search(model(SMALL, table), tmp_path, optimise=0).errors, "allows too much, and was not detected"


def test_remembering_changes_finds_an_error_that_the_model_misses_without(
    tmp_path: Path,
) -> None:
    table = attempts_on_replaced_memory_not_called_stale()
    forgetful = edited(table, "change", lambda row: replace(row, then=row.then[:1]))
    assert [effect.variable for effect in table["change"].then] == [BACKED, OUTDATED]
    of_old_frames = [promise for promise in PROMISES if promise.holds == Within(OLD, OfAll(DUE))]
    assert search(model(SMALL, table, of_old_frames), tmp_path / "with", optimise=0).errors
    assert not search(model(SMALL, forgetful, of_old_frames), tmp_path / "without", optimise=0).errors
