"""Every mutant of the transition table: a row, a condition or an effect is left out.

Owns the edits of the table.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from model.shadow import shown
from model.transitions import terms as t
from model.transitions.table import TABLE


def mutants(table: t.Table = TABLE) -> Iterator[tuple[str, t.Table]]:
    """Each with its name."""
    for name, row in table.items():
        yield f"{name}: left out", {each: kept for each, kept in table.items() if each != name}
        for condition in row.when:
            yield f"{name}: without `{shown(condition)}`", without_condition(table, name, condition)
        for effect in row.then:
            what = f"{'each ' if isinstance(effect, t.PutEach) else ''}{effect.variable.name}"
            yield f"{name}: {what} stays as it is", without_effect(table, name, effect)


def without_condition(table: t.Table, name: str, condition: t.Condition) -> t.Table:
    return edited(table, name, lambda row: replace(row, when=_without(row.when, condition)))


def without_effect(table: t.Table, name: str, effect: t.Effect) -> t.Table:
    return edited(table, name, lambda row: replace(row, then=_without(row.then, effect)))


def edited(table: t.Table, name: str, edit: Callable[[t.Row], t.Row]) -> t.Table:
    return {**table, name: edit(table[name])}


def _without(terms: tuple, term: object) -> tuple:  # type: ignore[type-arg]
    assert term in terms, "what is left out was there"
    return tuple(each for each in terms if each != term)
