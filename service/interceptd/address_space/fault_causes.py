"""Counts and logs why the faults of a partition found nothing to map, for people whose guest makes no
progress or reaches nothing.

Owns the counts and the pace of the lines. Of undecided faults (RETRY), the first is logged at once, the
following ones in one line per minute; of unbacked ones (FORWARD), the first of each cause, except where
nothing is mapped, which may be what the VMM wants. Must not know the causes.
"""

from __future__ import annotations

import math
from collections import Counter

import structlog
import trio

from interceptd.address_space import Undecided
from interceptd.address_space.refusals import Cause

log = structlog.get_logger()

PERIOD_SECONDS = 60.0
"""Between two lines about undecided faults: VPs fail hundreds of times per second while a cause lasts."""


class FaultCauses:
    """One per partition. `counts` are of look-ups, of which one fault may need several."""

    def __init__(self) -> None:
        self.counts: Counter[Cause] = Counter()
        self._undecided = 0
        self._silent_until = -math.inf

    def unbacked(self, cause: Cause, detail: str = "") -> None:
        self.counts[cause] += 1
        if self.counts[cause] == 1 and cause is not Cause.NO_VMA:
            log.warning("faults_unbacked", error=cause.with_detail(detail))

    def undecided(self, reason: Undecided) -> None:
        self.counts[reason.cause] += 1
        self._undecided += 1
        now = trio.current_time()
        if now >= self._silent_until:
            log.warning("faults_undecided", error=str(reason), faults=self._undecided)
            self._undecided, self._silent_until = 0, now + PERIOD_SECONDS
