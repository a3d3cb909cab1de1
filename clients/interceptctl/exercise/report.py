"""What an exercise found, as one value.

Owns the figures of the summary and the verdict; must not know how they are shown.
"""

from __future__ import annotations

import statistics

import msgspec

from intercept_protocol.messages import PartitionStatistics

from .scenario import Scenario
from .tally import Finding, Tally, Wrong


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """`intercepts` is by outcome and reason, as the daemon counted it; latency as the guests felt it."""

    setting: str
    seed: int
    vps: int
    steps: int
    seconds: float
    intercepts: dict[str, dict[str, int]]
    map_calls: int
    pages_mapped: int
    invalidations: int
    stale_attempts: int
    looks: int
    stale_reads: int
    wrongs: dict[Wrong, int]
    median_us: float
    p99_us: float
    findings: list[Finding]

    @property
    def passed(self) -> bool:
        return not self.wrongs

    @property
    def intercept_count(self) -> int:
        return sum(sum(reasons.values()) for reasons in self.intercepts.values())

    @classmethod
    def of(
        cls,
        setting: str,
        scenario: Scenario,
        tally: Tally,
        daemon: PartitionStatistics,
        seconds: float,
    ) -> Report:
        median, p99 = _median_and_p99(tally)
        return cls(
            setting=setting,
            seed=scenario.seed,
            vps=scenario.vps,
            steps=tally.steps,
            seconds=round(seconds, 2),
            intercepts=daemon.intercepts,
            map_calls=daemon.map_calls,
            pages_mapped=daemon.mapped_gfns,
            invalidations=daemon.invalidations,
            stale_attempts=daemon.stale_attempts,
            looks=tally.looks,
            stale_reads=tally.stale_reads,
            wrongs=dict(tally.wrongs),
            median_us=round(median * 1e6, 1),
            p99_us=round(p99 * 1e6, 1),
            findings=tally.findings,
        )


def _median_and_p99(tally: Tally) -> tuple[float, float]:
    if len(tally.latencies) < 2:
        return 0.0, 0.0
    percentiles = statistics.quantiles(tally.latencies, n=100)
    return percentiles[49], percentiles[98]
