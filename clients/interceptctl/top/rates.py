"""Rates from two snapshots of the counters.

Owns the arithmetic: pure. Time is the daemon's, so a slow connection does not distort the rates.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final, Generic, TypeVar

import msgspec

from intercept_protocol.messages import DaemonStatistics, PartitionSummary, VpHistogram
from intercept_protocol.outcomes import Outcome
from interceptctl.quantiles import Quantiles, at_once, quantiles

HISTORY: Final = 20
"""How many rates are kept for the sparkline."""


class Sort(StrEnum):
    """The order of a frame's lines."""

    RATE = "rate"
    """Highest rate first."""
    P99 = "p99"
    """Highest P99 first, of the intercepts that did not wait."""
    RETRY = "retry"
    """Most retries first; of VPs, which are not asked for theirs, the highest rate first."""
    ID = "id"


@dataclass(frozen=True, slots=True)
class Counted:
    """A partition's counters at one moment."""

    summary: PartitionSummary
    intercepts: Mapping[str, Mapping[str, int]]
    """By outcome and reason."""
    restored_pages: int | None = None
    """Of a guest whose memory comes from an image: pages brought in."""

    def outcome(self, outcome: Outcome) -> int:
        return sum(self.intercepts.get(outcome.value, {}).values())


@dataclass(frozen=True, slots=True)
class VpCounted:
    """A VP's counters at one moment, and its partition."""

    summary: PartitionSummary
    histogram: VpHistogram


@dataclass(frozen=True, slots=True)
class Sample:
    """The daemon's counters at one moment: of partitions by id, or of VPs by partition id and index."""

    daemon: DaemonStatistics
    partitions: Mapping[int, Counted] = field(default_factory=dict)
    vps: Mapping[tuple[int, int], VpCounted] = field(default_factory=dict)


class Rate(msgspec.Struct, frozen=True, kw_only=True):
    """One partition's line. Rates (per second) and quantiles are of the time between two samples."""

    summary: PartitionSummary
    intercepts: float
    outcomes: dict[str, float]
    invalidations: float
    restored_pages: float | None
    """None for a guest whose memory does not come from an image."""
    at_once: Quantiles
    waited: Quantiles
    """Of the intercepts that waited for an invalidation, or for another VP's map or unmap (O-14)."""
    history: list[float]

    @property
    def place(self) -> tuple[int, int]:
        return self.summary.partition_id, 0

    @property
    def retries(self) -> float:
        return self.outcomes[Outcome.RETRY]


class VpRate(msgspec.Struct, frozen=True, kw_only=True):
    """One VP's line. `mean_ns` is of the intercepts answered at once; None if there were none."""

    partition_id: int
    name: str
    vp_index: int
    intercepts: float
    mean_ns: float | None
    at_once: Quantiles
    waited: Quantiles
    history: list[float]

    @property
    def place(self) -> tuple[int, int]:
        return self.partition_id, self.vp_index

    @property
    def retries(self) -> float:
        """Not known of a VP: the rate stands for it."""
        return self.intercepts


Line = TypeVar("Line", Rate, VpRate)
Key = TypeVar("Key")


def in_order(lines: Sequence[Line], sort: Sort) -> list[Line]:
    """Lines ordered by `sort`, ties by id."""
    by_place = sorted(lines, key=lambda line: line.place)
    match sort:
        case Sort.RATE:
            return sorted(by_place, key=lambda line: -line.intercepts)
        case Sort.P99:
            return sorted(by_place, key=lambda line: -(line.at_once.p99_ns or 0))
        case Sort.RETRY:
            return sorted(by_place, key=lambda line: -line.retries)
        case Sort.ID:
            return by_place


class _Histories(Generic[Key]):
    """The latest rates of each line."""

    def __init__(self) -> None:
        self._rates: dict[Key, deque[float]] = {}

    def keep(self, keys: Collection[Key]) -> None:
        """Forget all other lines."""
        self._rates = {key: self._rates.get(key, deque(maxlen=HISTORY)) for key in keys}

    def add(self, key: Key, rate: float) -> list[float]:
        self._rates[key].append(rate)
        return list(self._rates[key])


class Rates:
    """Turns successive samples into lines; keeps the last sample and a short history."""

    def __init__(self) -> None:
        self._before: Sample | None = None
        self._partitions: _Histories[int] = _Histories()
        self._vps: _Histories[tuple[int, int]] = _Histories()

    def forget(self) -> None:
        """The next sample is of a daemon that has begun to count anew; each rate begins again at 0."""
        self._before = None

    def take(self, sample: Sample) -> list[Rate]:
        """The partitions of `sample`; a new one starts from 0."""
        seconds, before = self._since(sample)
        self._partitions.keep(sample.partitions)
        then = {} if before is None else before.partitions
        return [
            self._rate(then.get(key, now), now, seconds if key in then else 0.0)
            for key, now in sample.partitions.items()
        ]

    def take_vps(self, sample: Sample) -> list[VpRate]:
        """Like `take`, for VPs."""
        seconds, before = self._since(sample)
        self._vps.keep(sample.vps)
        then = {} if before is None else before.vps
        return [
            self._vp_rate(then.get(key, now), now, seconds if key in then else 0.0)
            for key, now in sample.vps.items()
        ]

    def _since(self, sample: Sample) -> tuple[float, Sample | None]:
        before, self._before = self._before, sample
        return (sample.daemon.uptime_ms - before.daemon.uptime_ms) / 1000 if before else 0.0, before

    def _rate(self, then: Counted, now: Counted, seconds: float) -> Rate:
        intercepts = per_second(now.summary.intercepts - then.summary.intercepts, seconds)
        past, present = then.summary, now.summary
        return Rate(
            summary=now.summary,
            intercepts=intercepts,
            outcomes={
                outcome.value: per_second(now.outcome(outcome) - then.outcome(outcome), seconds)
                for outcome in Outcome
            },
            invalidations=per_second(now.summary.invalidations - then.summary.invalidations, seconds),
            restored_pages=None
            if now.restored_pages is None
            else per_second(now.restored_pages - (then.restored_pages or 0), seconds),
            at_once=quantiles(
                at_once(past.latency, past.latency_waited), at_once(present.latency, present.latency_waited)
            ),
            waited=quantiles(past.latency_waited, present.latency_waited),
            history=self._partitions.add(now.summary.partition_id, intercepts),
        )

    def _vp_rate(self, then: VpCounted, now: VpCounted, seconds: float) -> VpRate:
        past, present = then.histogram, now.histogram
        number = present.intercepts - past.intercepts
        before, after = (at_once(each.buckets, each.waited_buckets) for each in (past, present))
        prompt = sum(after) - sum(before)
        took = present.total_ns - present.waited_ns - (past.total_ns - past.waited_ns)
        key = now.summary.partition_id, now.histogram.vp_index
        return VpRate(
            partition_id=now.summary.partition_id,
            name=now.summary.name,
            vp_index=now.histogram.vp_index,
            intercepts=per_second(number, seconds),
            mean_ns=took / prompt if prompt > 0 else None,
            at_once=quantiles(before, after),
            waited=quantiles(past.waited_buckets, present.waited_buckets),
            history=self._vps.add(key, per_second(number, seconds)),
        )


def per_second(number: int, seconds: float) -> float:
    """0 if no time has passed, or if the daemon was replaced by one whose counters are lower."""
    return max(0.0, number / seconds) if seconds > 0 else 0.0
