"""What one thing was, over logical time, as far as the one who changes it can know.

Owns the rule of uncertainty: of a change that was asked for at s and acknowledged at e, both the old and the
new value are possible at every instant in [s, e]. Must not know what the values are.
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
    """One change at a time: the next is asked for when the last was acknowledged or refused."""

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
        """A change to `value` was requested: from now on it may be so."""
        assert self._asked is None, "a change is under way"
        self._asked = Span(value, at)

    def acknowledge(self, at: int, horizon: int) -> None:
        """The change was made: the old value is impossible now. What ended before `horizon` is forgotten."""
        assert self._asked is not None, "nothing was asked"
        self._settled.until = at
        self._keep(self._settled, horizon)
        self._settled, self._asked = self._asked, None

    def refuse(self, at: int, horizon: int) -> None:
        """The change was not made; it may have been there for a while, and is not any more."""
        assert self._asked is not None, "nothing was asked"
        self._asked.until = at
        self._keep(self._asked, horizon)
        self._asked = None

    def possible(self, during: During) -> list[tuple[Value, During]]:
        """Every value that was possible at some instant of `during`, with when within it."""
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
