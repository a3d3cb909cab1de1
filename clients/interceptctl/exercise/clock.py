"""Logical time: one counter for everything that this process sends and receives.

Owns the counter, and which questions have not been judged yet; must not know what they are about. Ticks are
unique, so any two sends and receives are ordered.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple


class During(NamedTuple):
    """All instants between two ticks, such as a question and its answer."""

    first: int
    last: int


class Clock:
    __slots__ = ("_now", "_open")

    def __init__(self) -> None:
        self._now = 0
        self._open: dict[int, None] = {}  # by tick, oldest first: inserted in order

    def tick(self) -> int:
        """The tick of something sent or received now."""
        self._now += 1
        return self._now

    @contextmanager
    def question(self) -> Iterator[int]:
        """The tick at which a question is sent. History since then is kept until the block ends."""
        asked = self.tick()
        self._open[asked] = None
        try:
            yield asked
        finally:
            del self._open[asked]

    @property
    def horizon(self) -> int:
        """No open or future question is about a time before this."""
        return next(iter(self._open), self._now)
