"""Latency histograms with 24 exponential buckets.

Owns the bounds of the buckets, those of QEMU's postcopy-latency-dist (10.1, `BLOCKTIME_LATENCY_BUCKET_N` in
migration/postcopy-ram.c): bucket n counts [2^n us, 2^(n+1) us); the first also counts shorter durations, the
last longer ones. Pure; must not know what is timed, nor who reads it.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Final

import msgspec

from intercept_protocol.messages import LATENCY_BUCKETS

BOUNDARIES_NS: Final = tuple(1000 << n for n in range(1, LATENCY_BUCKETS))
"""The upper bound of each bucket but the last, in nanoseconds: from 2 us to 2^23 us (8.4 s)."""


class LatencyHistogram:
    """Counts of durations, and their sum."""

    __slots__ = ("_by_width", "total_ns")

    def __init__(self) -> None:
        self._by_width = [0] * (LATENCY_BUCKETS + 1)
        """By the bit length of the duration in whole microseconds; a shorter one has bit length 0."""
        self.total_ns = 0

    def record(self, nanoseconds: int) -> None:
        """Count one duration, which must not be negative."""
        self.total_ns += nanoseconds
        try:
            self._by_width[(nanoseconds // 1000).bit_length()] += 1
        except IndexError:
            self._by_width[-1] += 1

    def add(self, other: LatencyHistogram) -> None:
        """Add the counts of `other`."""
        self.total_ns += other.total_ns
        self._by_width = list(map(operator.add, self._by_width, other._by_width))

    @property
    def count(self) -> int:
        return sum(self._by_width)

    @property
    def buckets(self) -> tuple[int, ...]:
        """The counts, shortest durations first."""
        none, shorter, *longer = self._by_width
        return (none + shorter, *longer)


class InterceptLatency(msgspec.Struct, frozen=True):
    """Durations of intercepts. Those that waited for other work are separate: the rest show our own speed."""

    at_once: LatencyHistogram = msgspec.field(default_factory=LatencyHistogram)
    waited: LatencyHistogram = msgspec.field(default_factory=LatencyHistogram)
    """For an invalidation to end, or for another task to map or unmap the page."""

    def add(self, other: InterceptLatency) -> None:
        """Add the counts of `other`."""
        self.at_once.add(other.at_once)
        self.waited.add(other.waited)

    @property
    def count(self) -> int:
        return self.at_once.count + self.waited.count

    @property
    def all(self) -> LatencyHistogram:
        """A new histogram of both."""
        return total((self.at_once, self.waited))


def total(histograms: Iterable[LatencyHistogram]) -> LatencyHistogram:
    """A new histogram with the sums of these."""
    whole = LatencyHistogram()
    for histogram in histograms:
        whole.add(histogram)
    return whole
