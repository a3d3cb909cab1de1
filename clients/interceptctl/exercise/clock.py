"""Logical time: one count for all that this process sends and hears.

Owns the count, and which questions are still to be judged; must not know what they are about. No tick is
given out twice, so of any two sends and receives it is known which came first.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple


class During(NamedTuple):
    """All instants from one tick to another, as between a question and its answer."""

    first: int
    last: int


class Clock:
    __slots__ = ("_now", "_open")

    def __init__(self) -> None:
        self._now = 0
        self._open: dict[int, None] = {}  # by tick, oldest first: they are inserted in order

    def tick(self) -> int:
        """The tick of something that is sent or heard now."""
        self._now += 1
        return self._now

    @contextmanager
    def question(self) -> Iterator[int]:
        """The tick at which a question is sent; what was true since then is kept until the block ends."""
        asked = self.tick()
        self._open[asked] = None
        try:
            yield asked
        finally:
            del self._open[asked]

    @property
    def horizon(self) -> int:
        """No question, open or to come, is about a time before this one."""
        return next(iter(self._open), self._now)
