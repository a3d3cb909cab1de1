"""Spin over the transition table: ours breaks no promise in any order of steps, and each broken one does.

And the table itself: whatever row, condition or effect of it is left out, spin or the running code notices.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from model.mutants import edited, mutants
from model.promela import Scope, model
from model.recorder import Trace
from model.running_code import problems, traces
from model.spin import needs_spin, search
from model.transitions.promises import PROMISES
from model.transitions.table import BACKED, DUE, OLD, OUTDATED
from model.transitions.terms import OfAll, Table, Within
from model.variants import VARIANTS, Variant, attempts_on_replaced_memory_not_called_stale

pytestmark = [pytest.mark.verify, needs_spin]

WORLDS = (
    Scope(pages=2, vps=2, sources=1),
    Scope(pages=2, vps=1, sources=2),
    Scope(pages=3, vps=1, sources=1),
)
SMALL = Scope(pages=2, vps=1, sources=1)
"""Where every mistake shows that is looked for below."""
MUTANTS = dict(mutants())
MEMORY = "change: each outdated stays as it is"
"""The one effect that only a broken variant needs: it remembers which frames are no longer the VMM's."""


@pytest.mark.parametrize("world", WORLDS, ids=str)
def test_no_order_of_steps_breaks_a_promise(tmp_path: Path, world: Scope) -> None:
    found = search(model(world), tmp_path)
    print(f"\n{world}: {found}")
    assert found.errors == 0
    assert found.states > 1_000_000, "the search has become another"


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS.keys())
def test_a_broken_variant_has_an_order_that_breaks_a_promise(tmp_path: Path, variant: Variant) -> None:
    found = search(model(SMALL, variant()), tmp_path, optimise=0)
    print(f"\n{variant.__name__}: {found}")
    assert found.errors
    assert found.broken


@pytest.fixture(scope="module")
def code_traces() -> list[Trace]:
    return traces(60)


@pytest.mark.parametrize("name", [name for name in MUTANTS if name != MEMORY])
def test_a_table_with_something_left_out_is_noticed_by_the_code_or_by_spin(
    tmp_path: Path, code_traces: list[Trace], name: str
) -> None:
    table: Table = MUTANTS[name]
    if any(problems(trace, table) for trace in code_traces):
        return
    assert search(model(SMALL, table), tmp_path, optimise=0).errors, "allowed too much, and nobody noticed"


def test_what_the_model_forgets_without_its_memory_of_changes_is_an_error_that_it_has_with_it(
    tmp_path: Path,
) -> None:
    table = attempts_on_replaced_memory_not_called_stale()
    forgetful = edited(table, "change", lambda row: replace(row, then=row.then[:1]))
    assert [effect.variable for effect in table["change"].then] == [BACKED, OUTDATED]
    of_old_frames = [promise for promise in PROMISES if promise.holds == Within(OLD, OfAll(DUE))]
    assert search(model(SMALL, table, of_old_frames), tmp_path / "with", optimise=0).errors
    assert not search(model(SMALL, forgetful, of_old_frames), tmp_path / "without", optimise=0).errors
