"""Logs why the faults of a partition are RETRY, for an operator whose guest makes no progress.

Owns the rate: the first is logged at once, the following ones are counted in one line per minute. Must not
know the reasons.
"""

from __future__ import annotations

import math

import structlog
import trio

from interceptd.address_space import Undecided

log = structlog.get_logger()

PERIOD_SECONDS = 60.0
"""Between two lines of a partition: its VPs fail hundreds of times per second while a cause lasts."""


class UndecidedLog:
    """One per partition."""

    def __init__(self) -> None:
        self._faults = 0
        self._silent_until = -math.inf

    def record(self, reason: Undecided) -> None:
        """Count a fault that was not decided, and log it if a line is due."""
        self._faults += 1
        now = trio.current_time()
        if now >= self._silent_until:
            log.warning("faults_undecided", error=str(reason), faults=self._faults)
            self._faults, self._silent_until = 0, now + PERIOD_SECONDS
