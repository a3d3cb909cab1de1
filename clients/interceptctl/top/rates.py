"""From counters seen at two moments to rates.

Owns the arithmetic: pure. Time is the daemon's own, so that a slow line to it makes no rate wrong.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

import msgspec

from intercept_protocol.messages import DaemonStatistics, PartitionSummary
from intercept_protocol.outcomes import Outcome

HISTORY: Final = 10
"""How many rates a sparkline shows."""


@dataclass(frozen=True, slots=True)
class Counted:
    """A partition's counters at one moment."""

    summary: PartitionSummary
    intercepts: Mapping[str, Mapping[str, int]]
    """By outcome and reason."""

    def outcome(self, outcome: Outcome) -> int:
        return sum(self.intercepts.get(outcome.value, {}).values())


@dataclass(frozen=True, slots=True)
class Sample:
    """What the daemon said at one moment."""

    daemon: DaemonStatistics
    partitions: Mapping[int, Counted]


class Rate(msgspec.Struct, frozen=True, kw_only=True):
    """One partition's line. Rates are per second, of the time between two samples."""

    summary: PartitionSummary
    intercepts: float
    outcomes: dict[str, float]
    invalidations: float
    history: list[float]


@dataclass(slots=True)
class Rates:
    """Turns one sample after another into lines; remembers the last sample and a short history."""

    _before: Sample | None = None
    _history: dict[int, deque[float]] = field(default_factory=dict)

    def take(self, sample: Sample) -> Sequence[Rate]:
        """The partitions of `sample`, the busiest first; one that was not there before starts from 0."""
        before, self._before = self._before, sample
        seconds = (sample.daemon.uptime_ms - before.daemon.uptime_ms) / 1000 if before else 0.0
        self._history = {number: self._history.get(number, deque()) for number in sample.partitions}
        rates = [
            self._rate(now if before is None else before.partitions.get(number, now), now, seconds)
            for number, now in sample.partitions.items()
        ]
        return sorted(
            rates, key=lambda rate: (-rate.intercepts, -rate.invalidations, rate.summary.partition_id)
        )

    def _rate(self, then: Counted, now: Counted, seconds: float) -> Rate:
        intercepts = per_second(now.summary.intercepts - then.summary.intercepts, seconds)
        history = self._history[now.summary.partition_id]
        history.append(intercepts)
        while len(history) > HISTORY:
            history.popleft()
        return Rate(
            summary=now.summary,
            intercepts=intercepts,
            outcomes={
                outcome.value: per_second(now.outcome(outcome) - then.outcome(outcome), seconds)
                for outcome in Outcome
            },
            invalidations=per_second(now.summary.invalidations - then.summary.invalidations, seconds),
            history=list(history),
        )


def per_second(number: int, seconds: float) -> float:
    """0 where no time has passed, and where a daemon was replaced by one that has counted less."""
    return max(0.0, number / seconds) if seconds > 0 else 0.0
