"""The transition table as a Promela model: one inline per row, one process per actor.

Owns the printing. Run it to write `tests/model/intercepts.pml`, which is kept so that it can be read and run
without us. Must not know what the rows mean.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from enum import Enum
from itertools import product
from pathlib import Path

from model.transitions import terms as t
from model.transitions.promises import PROMISES
from model.transitions.table import TABLE, VARIABLES

KEPT = Path(__file__).with_name("intercepts.pml")
ME = "me"
"""The acting one's number, where there are several."""


@dataclass(frozen=True)
class Scope:
    """How large a world is searched."""

    pages: int = 2
    vps: int = 1
    sources: int = 1
    without: frozenset[str] = frozenset()
    """Rows that nobody takes in it."""

    @property
    def everything(self) -> int:
        return (1 << self.pages) - 1

    def count(self, actor: t.Actor) -> int:
        return {t.Actor.VP: self.vps, t.Actor.SOURCE: self.sources}.get(actor, 1)


def model(scope: Scope, table: t.Table = TABLE, promises: Sequence[t.Promise] = PROMISES) -> str:
    """The whole text."""
    table = _read({name: row for name, row in table.items() if name not in scope.without}, promises)
    return "\n".join(
        [
            "/* Written by tests/model/promela.py from tests/model/transitions/table.py: edit that.",
            f"   A page set is a bit mask. The world: {scope.pages} pages, {scope.vps} VPs,"
            f" {scope.sources} source(s) of invalidations, a region manager, a VMM. */",
            *_states(),
            "",
            f"#define EVERYTHING {scope.everything}",
            "#define WITHIN(part, whole) (((part) & ~(whole)) == 0)",
            "#define MEET(left, right) (((left) & (right)) != 0)",
            "",
            *_variables(scope),
            "",
            *_always(scope, promises),
            *(line for name, row in table.items() for line in _inline(scope, name, row, promises)),
            *(line for actor in t.Actor for line in _processes(scope, actor, table)),
        ]
    )


def _read(table: t.Table, promises: Sequence[t.Promise]) -> t.Table:
    """Without the effects on variables on which nothing depends in this scope: they only make more states."""
    read = set(_variables_in([row.when for row in table.values()] + [each.holds for each in promises]))
    while True:
        table_read = [each for row in table.values() for each in row.then if each.variable in read]
        more = read.union(_variables_in(table_read))
        if more == read:
            kept = {name: [each for each in row.then if each.variable in read] for name, row in table.items()}
            return {name: replace(row, then=tuple(kept[name])) for name, row in table.items()}
        read = more


def _variables_in(term: object) -> Iterator[t.Variable]:
    """All that are named in a term, or in several."""
    if isinstance(term, t.Variable):
        yield term
    elif isinstance(term, list | tuple):
        for each in term:
            yield from _variables_in(each)
    elif is_dataclass(term) and not isinstance(term, Enum):
        for each in fields(term):
            yield from _variables_in(getattr(term, each.name))


def _states() -> Iterator[str]:
    kinds = dict.fromkeys(type(each.initially) for each in VARIABLES if isinstance(each.initially, Enum))
    for kind in kinds:
        for number, state in enumerate(kind):
            yield f"#define {_state(state)} {number}"


def _variables(scope: Scope) -> Iterator[str]:
    for variable in VARIABLES:
        size = "" if variable.of is None else f"[{scope.count(variable.of)}]"
        yield f"byte {variable.name}{size} = {_value(variable.initially, '0', scope)};"


def _always(scope: Scope, promises: Iterable[t.Promise]) -> Iterator[str]:
    yield "inline keep_promises() {"
    for promise in promises:
        if promise.at is None:
            yield f"  assert({_condition(promise.holds, ME, scope)});  /* {promise.sentence} */"
    yield "}"


def _inline(scope: Scope, name: str, row: t.Row, promises: Iterable[t.Promise]) -> Iterator[str]:
    names = [_parameter(each) for each in row.parameters]
    guard = " && ".join(_condition(each, ME, scope) for each in row.when) or "true"
    shown = "".join(f" {each.name} %d" for each in row.parameters)
    yield ""
    yield f"inline {name}({', '.join([ME, *names])}) {{ d_step {{"
    yield f"  {guard} ->"
    yield f'  printf("STEP {row.actor.value} %d {name}{shown}\\n", {", ".join([ME, *names])});'
    for promise in promises:
        if promise.at == name:
            yield f"  assert({_condition(promise.holds, ME, scope)});  /* {promise.sentence} */"
    for effect in row.then:
        yield from (f"  {line};" for line in _effect(effect, scope))
    yield "  keep_promises()"
    yield "} }"


def _processes(scope: Scope, actor: t.Actor, table: t.Table) -> Iterator[str]:
    for number in range(scope.count(actor)):
        yield ""
        yield f"active proctype {actor.value}_{number}() {{ do"
        for name, row in table.items():
            if row.actor is actor:
                for values in product(*(_choices(each, scope) for each in row.parameters)):
                    yield f"  :: {name}({', '.join(map(str, [number, *values]))})"
        yield "od }"


def _choices(parameter: t.Parameter, scope: Scope) -> Iterator[int]:
    for pages in range(scope.everything + 1):
        if not pages and not parameter.may_be_empty:
            continue
        if parameter.most is None or pages.bit_count() <= parameter.most:
            yield pages


def _effect(effect: t.Effect, scope: Scope) -> Iterator[str]:
    match effect:
        case t.Put(variable, value):
            yield f"{_named(variable, ME)} = {_value(value, ME, scope)}"
        case t.PutEach(variable, value, where):
            assert variable.of is not None
            for number in map(str, range(scope.count(variable.of))):
                name, now = _named(variable, number), _value(value, number, scope, acting=variable.of)
                held = " && ".join(_condition(each, number, scope, acting=variable.of) for each in where)
                yield f"{name} = ({held} -> {now} : {name})" if held else f"{name} = {now}"


def _condition(condition: t.Condition, me: str, scope: Scope, *, acting: t.Actor | None = None) -> str:
    def pages(value: t.Pages) -> str:
        return _pages(value, me, scope, acting)

    match condition:
        case t.Is(variable, states):
            alternatives = [f"{_named(variable, me)} == {_state(state)}" for state in states]
            return alternatives[0] if len(alternatives) == 1 else f"({' || '.join(alternatives)})"
        case t.Within(part, whole):
            return f"WITHIN({pages(part)}, {pages(whole)})"
        case t.Apart(left, right):
            return f"!MEET({pages(left)}, {pages(right)})"
        case t.Meet(left, right):
            return f"MEET({pages(left)}, {pages(right)})"
        case t.AnyIs(variable, state):
            assert variable.of is not None
            each = range(scope.count(variable.of))
            return f"({' || '.join(f'{variable.name}[{number}] == {_state(state)}' for number in each)})"
        case t.Either(left, right):
            return f"({_condition(left, me, scope)} || {_condition(right, me, scope)})"


def _value(value: t.Pages | Enum, me: str, scope: Scope, *, acting: t.Actor | None = None) -> str:
    return _state(value) if isinstance(value, Enum) else _pages(value, me, scope, acting)


def _pages(value: t.Pages, me: str, scope: Scope, acting: t.Actor | None) -> str:
    def of(part: t.Pages) -> str:
        return _pages(part, me, scope, acting)

    match value:
        case t.Variable():
            # within a PutEach the number is that of the one it is about; the others' keep the acting one's
            return _named(value, me if acting in (None, value.of) else ME)
        case t.Parameter():
            return _parameter(value)
        case t.Constant(name):
            return {"nothing": "0", "everything": "EVERYTHING"}[name]
        case t.Joined(left, right):
            return f"({of(left)} | {of(right)})"
        case t.Shared(left, right):
            return f"({of(left)} & {of(right)})"
        case t.Without(left, right):
            return f"({of(left)} & ~{of(right)})"
        case t.OfAll(variable):
            assert variable.of is not None
            return f"({' | '.join(f'{variable.name}[{each}]' for each in range(scope.count(variable.of)))})"
    raise AssertionError(value)


def _named(variable: t.Variable, me: str) -> str:
    return variable.name if variable.of is None else f"{variable.name}[{me}]"


def _parameter(parameter: t.Parameter) -> str:
    return f"the_{parameter.name}"


def _state(state: Enum) -> str:
    return f"{type(state).__name__}_{state.name}".upper()


if __name__ == "__main__":
    KEPT.write_text(model(Scope()) + "\n", encoding="utf-8")
