"""The values of one thing over logical time, as far as the party that changes it can know.

Owns the rule of uncertainty: if a change was requested at s and acknowledged at e, both the old and the new
value are possible at every instant in [s, e]. Must not know what the values are.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Generic, TypeVar

from .clock import During

Value = TypeVar("Value")

FOREVER = sys.maxsize


@dataclass(slots=True)
class Span(Generic[Value]):
    """`value` was possible at every instant in [since, until]."""

    value: Value
    since: int
    until: int = FOREVER


class History(Generic[Value]):
    """One change at a time: the last must be acknowledged or refused before the next is requested."""

    __slots__ = ("_asked", "_past", "_settled")

    def __init__(self, value: Value) -> None:
        self._settled = Span(value, 0)
        self._asked: Span[Value] | None = None
        self._past: list[Span[Value]] = []

    @property
    def now(self) -> Value:
        """The value that was acknowledged last."""
        return self._settled.value

    def ask(self, value: Value, at: int) -> None:
        """A change to `value` was requested: it is possible from now on."""
        assert self._asked is None, "a change is under way"
        self._asked = Span(value, at)

    def acknowledge(self, at: int, horizon: int) -> None:
        """The change was made: the old value is now impossible. Spans from before `horizon` are dropped."""
        assert self._asked is not None, "no change is under way"
        self._settled.until = at
        self._keep(self._settled, horizon)
        self._settled, self._asked = self._asked, None

    def refuse(self, at: int, horizon: int) -> None:
        """The change was refused: the new value was possible for a while, and no longer is."""
        assert self._asked is not None, "no change is under way"
        self._asked.until = at
        self._keep(self._asked, horizon)
        self._asked = None

    def possible(self, during: During) -> list[tuple[Value, During]]:
        """Every value that was possible at some instant of `during`, and when."""
        spans = [*self._past, self._settled]
        if self._asked is not None:
            spans.append(self._asked)
        return [
            (span.value, During(max(span.since, during.first), min(span.until, during.last)))
            for span in spans
            if span.since <= during.last and during.first <= span.until
        ]

    def _keep(self, span: Span[Value], horizon: int) -> None:
        self._past = [old for old in (*self._past, span) if old.until >= horizon]
