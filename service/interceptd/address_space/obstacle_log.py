"""Why the faults of a partition are RETRY, for the operator who wonders why its guest does not go on.

Owns the pace: the first is logged at once, those that follow are counted in one line a minute. Must not know
what the obstacles are.
"""

from __future__ import annotations

import math

import structlog
import trio

from interceptd.address_space import Undecided

log = structlog.get_logger()

PACE_SECONDS = 60.0
"""Between two lines of a partition: its VPs meet a lasting obstacle hundreds of times a second."""


class ObstacleLog:
    """One partition's."""

    def __init__(self) -> None:
        self._faults = 0
        self._silent_until = -math.inf

    def tell(self, obstacle: Undecided) -> None:
        """A fault met it."""
        self._faults += 1
        now = trio.current_time()
        if now >= self._silent_until:
            log.warning("faults_undecided", error=str(obstacle), faults=self._faults)
            self._faults, self._silent_until = 0, now + PACE_SECONDS
