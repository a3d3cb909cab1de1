"""A simpler reference than the exerciser's: it keeps the whole history and checks every instant.

Owns what was possible between any two ticks, for one page under one region. `exercise.truth`, which drops
history, is compared with it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from intercept_protocol.outcomes import Access, Answer
from interceptctl.exercise.clock import During
from interceptctl.exercise.world import RESUMED, Backing, Region, Sight, decide, sight

Value = TypeVar("Value")


@dataclass
class Change(Generic[Value]):
    value: Value
    asked: float = -2
    acknowledged: float = -1


@dataclass
class Plainest:
    """Changes in the order in which they were asked for; `shut` from the answer to a begin until its end."""

    regions: list[Change[Region | None]] = field(default_factory=lambda: [Change(None)])
    backings: list[Change[Backing | None]] = field(default_factory=lambda: [Change(None)])
    shut: list[tuple[float, float]] = field(default_factory=list)

    def answers(self, access: Access, during: During) -> set[Answer]:
        return {
            answer
            for instant in instants(during)
            for region in possible(self.regions, instant)
            for backing in possible(self.backings, instant)
            for answer in decide(region, backing, access)
            if not (answer in RESUMED and self._is_shut(instant))
        }

    def sights(self, during: During) -> set[Sight]:
        seen = {
            sight(region, backing)
            for instant in instants(during)
            for region in possible(self.regions, instant)
            for backing in possible(self.backings, instant)
            if not self._is_shut(instant)
        }
        return {something for something in seen if something is not None}

    def _is_shut(self, instant: float) -> bool:
        return any(first < instant < last for first, last in self.shut)


def begin(changes: list[Change[Value]], value: Value, asked: int) -> Change[Value]:
    """A change to `value` is asked for."""
    change = Change(value, asked, math.inf)
    changes.append(change)
    return change


def instants(during: During) -> list[float]:
    """One instant between every two ticks: within it, nothing is asked or acknowledged."""
    return [tick + 0.5 for tick in range(during.first, during.last)]


def possible(changes: list[Change[Value]], instant: float) -> list[Value]:
    """What was acknowledged last, and what was under way."""
    done = [change.value for change in changes if change.acknowledged < instant]
    under_way = [change.value for change in changes if change.asked < instant < change.acknowledged]
    return [done[-1], *under_way]
