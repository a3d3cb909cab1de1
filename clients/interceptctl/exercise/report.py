"""The result of an exercise.

Owns the figures of the summary and the verdict; must not know how they are shown.
"""

from __future__ import annotations

import msgspec

from intercept_protocol.messages import PartitionStatistics
from intercept_protocol.outcomes import Answer, Outcome
from interceptctl.quantiles import Counts, Quantiles, at_once, quantiles

from .kills import Kills
from .lives import added
from .scenario import Scenario
from .tally import Finding, Tally, Wrong


class Took(msgspec.Struct, frozen=True, kw_only=True):
    """A number of intercepts, and how long they took in the daemon."""

    intercepts: int
    quantiles: Quantiles

    @classmethod
    def of(cls, counts: Counts) -> Took:
        return cls(intercepts=sum(counts), quantiles=quantiles((), counts))


class Killed(msgspec.Struct, frozen=True, kw_only=True):
    """How often the daemon was killed, and the intercepts that met a kill: those answered late because of it,
    and for how many milliseconds the longest waited."""

    count: int
    waited: int
    longest_wait_ms: int

    @classmethod
    def of(cls, kills: Kills) -> Killed:
        return cls(count=kills.count, waited=kills.waited, longest_wait_ms=round(1000 * kills.longest_wait))


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """`intercepts` is by outcome and reason. What a daemon counted just before it was killed is not in
    `map_calls`, `invalidations`, `stale_attempts` and the times.

    `answered_at_once` shows how fast the daemon is; `waited`, how long the VMM kept its invalidations open.
    """

    mode: str
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
    kills: Killed
    wrongs: dict[Wrong, int]
    answered_at_once: Took
    waited: Took
    findings: list[Finding]

    @property
    def passed(self) -> bool:
        return not self.wrongs

    @property
    def intercept_count(self) -> int:
        return sum(sum(reasons.values()) for reasons in self.intercepts.values())

    @classmethod
    def of(
        cls, scenario: Scenario, tally: Tally, kills: Kills, last: PartitionStatistics, seconds: float
    ) -> Report:
        daemon = added([*kills.lives, last])
        return cls(
            mode=scenario.mode.title,
            seed=scenario.seed,
            vps=scenario.vps,
            steps=tally.steps,
            seconds=round(seconds, 2),
            intercepts={
                outcome.value: {
                    answer.reason: tally.answers[answer] for answer in Answer if answer.outcome is outcome
                }
                for outcome in Outcome
            },
            map_calls=daemon.map_calls,
            pages_mapped=daemon.mapped_gfns,
            invalidations=daemon.invalidations,
            stale_attempts=daemon.stale_attempts,
            looks=tally.looks,
            stale_reads=tally.stale_reads,
            kills=Killed.of(kills),
            wrongs=dict(tally.wrongs),
            answered_at_once=Took.of(at_once(daemon.latency, daemon.latency_waited)),
            waited=Took.of(daemon.latency_waited),
            findings=tally.findings,
        )
