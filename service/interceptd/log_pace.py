"""How often a line that may come again and again is written: of each kind once a minute.

Owns when a line of each kind was written, and how many were passed over since. Must not know what is logged.
Where `log_share` bounds what a client writes, this keeps a lasting state from filling the log.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable
from typing import Final

SECONDS: Final = 60.0
"""Between two lines of a kind."""


class LogPace:
    """`clock` is in seconds. The caller has few kinds: each is remembered."""

    __slots__ = ("_clock", "_kinds")

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._kinds: dict[Hashable, tuple[float, int]] = {}
        """When the last line was written, and how many were passed over since."""

    def passed_over(self, kind: Hashable) -> int | None:
        """How many lines of this kind were passed over since the last one, if another may be written now;
        None if it is passed over, too."""
        now = self._clock()
        written, count = self._kinds.get(kind, (now - SECONDS, 0))
        if now - written < SECONDS:
            self._kinds[kind] = (written, count + 1)
            return None
        self._kinds[kind] = (now, 0)
        return count

    @property
    def idle(self) -> bool:
        """Whether a line of any kind may be written now."""
        now = self._clock()
        return all(now - written >= SECONDS for written, _ in self._kinds.values())
