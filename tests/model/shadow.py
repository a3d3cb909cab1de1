"""Executes the transition table beside the running code: one row at a time, or the reason why it must not.

Owns the evaluation of the terms. Must not know what the rows mean.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum

from model.transitions import terms as t
from model.transitions.promises import PROMISES
from model.transitions.table import TABLE, VARIABLES

Value = int | Enum
Key = tuple[str, int]
"""A variable and whose it is; 0 where there is one."""


@dataclass(frozen=True)
class Step:
    """A row that was taken; `me` is the number of the VP or the source."""

    row: str
    me: int = 0
    pages: Mapping[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        return " ".join(
            [self.row, str(self.me), *(f"{name}={pages:#b}" for name, pages in self.pages.items())]
        )


class Shadow:
    """`everything` are the pages of the region."""

    def __init__(
        self,
        *,
        everything: int,
        vps: int,
        sources: int,
        table: t.Table = TABLE,
        promises: Sequence[t.Promise] = PROMISES,
    ) -> None:
        self._everything = everything
        self._counts = {t.Actor.VP: vps, t.Actor.SOURCE: sources}
        self._table = table
        self._promises = promises
        self._values: dict[Key, Value] = {
            (variable.name, number): self._initial(variable)
            for variable in VARIABLES
            for number in range(self._counts[variable.of] if variable.of else 1)
        }

    def __getitem__(self, key: Key) -> Value:
        return self._values[key]

    def of_all(self, variable: t.Variable) -> int:
        return self._pages(t.OfAll(variable), 0, {})

    def take(self, step: Step) -> list[str]:
        """Take the step; what forbids it, and the promises that it breaks."""
        row = self._table.get(step.row)
        if row is None:
            return [f"{step}: there is no such row"]
        problems = [
            f"{step}: not allowed, for {shown(condition)} does not hold"
            for condition in row.when
            if not self._holds(condition, step.me, step.pages)
        ]
        problems += self._broken(step, step.row)
        for effect in row.then:
            self._make(effect, step)
        return [*problems, *self._broken(step, None)]

    def _initial(self, variable: t.Variable) -> Value:
        if isinstance(variable.initially, Enum):
            return variable.initially
        return self._pages(variable.initially, 0, {})

    def _broken(self, step: Step, at: str | None) -> Iterator[str]:
        for promise in self._promises:
            if promise.at == at and not self._holds(promise.holds, step.me, step.pages):
                yield f"{step}: a promise is broken: {promise.sentence}"

    def _make(self, effect: t.Effect, step: Step) -> None:
        match effect:
            case t.Put(variable, value):
                self._values[variable.name, self._number(variable, step.me)] = self._value(
                    value, step, None, 0
                )
            case t.PutEach(variable, value, where):
                assert variable.of is not None
                for number in range(self._counts[variable.of]):
                    about = {variable.of: number}
                    if all(self._holds(each, step.me, step.pages, about) for each in where):
                        self._values[variable.name, number] = self._value(value, step, variable.of, number)

    def _value(self, value: t.Pages | Enum, step: Step, of: t.Actor | None, number: int) -> Value:
        if isinstance(value, Enum):
            return value
        return self._pages(value, step.me, step.pages, {} if of is None else {of: number})

    def _holds(
        self,
        condition: t.Condition,
        me: int,
        parameters: Mapping[str, int],
        about: Mapping[t.Actor, int] | None = None,
    ) -> bool:
        def pages(value: t.Pages) -> int:
            return self._pages(value, me, parameters, about)

        match condition:
            case t.Is(variable, states):
                return self._values[variable.name, self._number(variable, me, about)] in states
            case t.Within(part, whole):
                return not pages(part) & ~pages(whole)
            case t.Apart(left, right):
                return not pages(left) & pages(right)
            case t.Meet(left, right):
                return bool(pages(left) & pages(right))
            case t.AnyIs(variable, state):
                assert variable.of is not None
                return any(
                    self._values[variable.name, number] is state
                    for number in range(self._counts[variable.of])
                )
            case t.Either(left, right):
                return any(self._holds(each, me, parameters, about) for each in (left, right))

    def _pages(
        self,
        value: t.Pages,
        me: int,
        parameters: Mapping[str, int],
        about: Mapping[t.Actor, int] | None = None,
    ) -> int:
        match value:
            case t.Variable(name):
                held = self._values[name, self._number(value, me, about)]
                assert isinstance(held, int)
                return held
            case t.Parameter(name):
                return parameters[name]
            case t.Constant():
                return self._everything if value is t.EVERYTHING else 0
            case t.OfAll(variable):
                assert variable.of is not None
                joined = 0
                for number in range(self._counts[variable.of]):
                    joined |= self._pages(variable, number, {})
                return joined
            case t.Joined(left, right):
                return self._pages(left, me, parameters, about) | self._pages(right, me, parameters, about)
            case t.Shared(left, right):
                return self._pages(left, me, parameters, about) & self._pages(right, me, parameters, about)
            case t.Without(left, right):
                return self._pages(left, me, parameters, about) & ~self._pages(right, me, parameters, about)
        raise AssertionError(value)

    @staticmethod
    def _number(variable: t.Variable, me: int, about: Mapping[t.Actor, int] | None = None) -> int:
        return 0 if variable.of is None else (about or {}).get(variable.of, me)


def shown(term: t.Condition | t.Pages) -> str:
    """A condition in words, for an error."""
    match term:
        case t.Is(variable, states):
            return f"{variable.name} is {' or '.join(state.value for state in states)}"
        case t.Within(part, whole):
            return f"{shown(part)} within {shown(whole)}"
        case t.Apart(left, right):
            return f"{shown(left)} apart from {shown(right)}"
        case t.Meet(left, right):
            return f"{shown(left)} meets {shown(right)}"
        case t.Variable(name) | t.Parameter(name) | t.Constant(name):
            return name
        case t.OfAll(variable):
            return f"every {variable.name}"
        case t.Joined(left, right):
            return f"({shown(left)} or {shown(right)})"
        case t.Shared(left, right):
            return f"({shown(left)} and {shown(right)})"
        case t.Without(left, right):
            return f"({shown(left)} but for {shown(right)})"
    return str(term)
