"""The words in which the transition table is written: variables, page sets, conditions and effects, as data.

Owns the vocabulary alone. A page set is a bit mask. Must not know the algorithm, nor what is done with the
table: a validator evaluates these terms, a generator prints them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum


class Actor(Enum):
    """Who takes a step. There are several VPs and several sources, one of each other."""

    VP = "vp"
    SOURCE = "source"
    MANAGER = "manager"
    VMM = "vmm"


class Pages:
    """A set of pages: a variable, a parameter, or made of those."""

    def __or__(self, other: Pages) -> Pages:
        return Joined(self, other)

    def __and__(self, other: Pages) -> Pages:
        return Shared(self, other)

    def __sub__(self, other: Pages) -> Pages:
        return Without(self, other)


@dataclass(frozen=True, slots=True)
class Constant(Pages):
    name: str


NOTHING = Constant("nothing")
EVERYTHING = Constant("everything")


@dataclass(frozen=True, slots=True)
class Variable(Pages):
    """A state or a page set, or one for each `of` the actors. In a row the acting one's is meant."""

    name: str
    of: Actor | None = None
    initially: Enum | Constant = NOTHING


@dataclass(frozen=True, slots=True)
class Parameter(Pages):
    """A page set that a step comes with; never empty unless it may be."""

    name: str
    most: int | None = None
    """Pages that it has at most."""
    may_be_empty: bool = False


@dataclass(frozen=True, slots=True)
class Joined(Pages):
    left: Pages
    right: Pages


@dataclass(frozen=True, slots=True)
class Shared(Pages):
    left: Pages
    right: Pages


@dataclass(frozen=True, slots=True)
class Without(Pages):
    left: Pages
    right: Pages


@dataclass(frozen=True, slots=True)
class OfAll(Pages):
    """What any of the actors has in this variable."""

    variable: Variable


# ------------------------------------------------ conditions


@dataclass(frozen=True, slots=True)
class Is:
    """A variable stands at one of these states."""

    variable: Variable
    states: tuple[Enum, ...]


@dataclass(frozen=True, slots=True)
class Within:
    """All of `part` lies in `whole`."""

    part: Pages
    whole: Pages


@dataclass(frozen=True, slots=True)
class Apart:
    """The two share no page."""

    left: Pages
    right: Pages


@dataclass(frozen=True, slots=True)
class Meet:
    """The two share a page."""

    left: Pages
    right: Pages


@dataclass(frozen=True, slots=True)
class AnyIs:
    """For some actor the variable stands at this state."""

    variable: Variable
    state: Enum


@dataclass(frozen=True, slots=True)
class Either:
    left: Condition
    right: Condition


Condition = Is | Within | Apart | Meet | AnyIs | Either


# ------------------------------------------------ effects


@dataclass(frozen=True, slots=True)
class Put:
    """The variable, the acting one's if there are several, has this value then."""

    variable: Variable
    value: Pages | Enum


@dataclass(frozen=True, slots=True)
class PutEach:
    """For every actor for which `where` holds, its variable has this value then."""

    variable: Variable
    value: Pages | Enum
    where: tuple[Condition, ...] = ()


Effect = Put | PutEach


@dataclass(frozen=True, slots=True)
class Row:
    """One step: it may be taken when all of `when` holds, and all of `then` is so afterwards, at once.

    Effects are made in their order, and each sees what those before it made.
    """

    actor: Actor
    parameters: tuple[Parameter, ...]
    when: tuple[Condition, ...]
    then: tuple[Effect, ...]


@dataclass(frozen=True, slots=True)
class Promise:
    """What must hold: in the state in which the row `at` is taken, or always where there is none."""

    sentence: str
    holds: Condition
    at: str | None = None


Table = Mapping[str, Row]
