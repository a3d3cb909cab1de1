"""Latency histograms: how long things took, in 24 buckets that double.

Owns the buckets' bounds, which are those of QEMU's postcopy-latency-dist (10.1, `BLOCKTIME_LATENCY_BUCKET_N`
in migration/postcopy-ram.c): bucket n counts [2^n us, 2^(n+1) us), the first also what is shorter and the
last what is longer. Pure counting; must not know what is timed, or who reads it.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Final

import msgspec

from intercept_protocol.messages import LATENCY_BUCKETS

BOUNDARIES_NS: Final = tuple(1000 << n for n in range(1, LATENCY_BUCKETS))
"""Where each bucket but the last ends and the next begins, in nanoseconds: from 2 us to 2^23 us (8.4 s)."""


class LatencyHistogram:
    """Counts of durations, and their sum. To record one takes a fifth of a microsecond."""

    __slots__ = ("_by_width", "total_ns")

    def __init__(self) -> None:
        self._by_width = [0] * (LATENCY_BUCKETS + 1)
        """By the bit length of the duration in whole microseconds; what is shorter than one has length 0."""
        self.total_ns = 0

    def record(self, nanoseconds: int) -> None:
        """Count one duration, which is not negative."""
        self.total_ns += nanoseconds
        try:
            self._by_width[(nanoseconds // 1000).bit_length()] += 1
        except IndexError:
            self._by_width[-1] += 1

    def add(self, other: LatencyHistogram) -> None:
        """Count all that `other` counted."""
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
    """How long intercepts took. Those that waited for somebody else are apart: the others show our speed."""

    at_once: LatencyHistogram = msgspec.field(default_factory=LatencyHistogram)
    waited: LatencyHistogram = msgspec.field(default_factory=LatencyHistogram)
    """For an invalidation to end, or another's map or unmap of the page."""

    def add(self, other: InterceptLatency) -> None:
        """Count all that `other` counted."""
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
    """A new histogram of all that these counted."""
    whole = LatencyHistogram()
    for histogram in histograms:
        whole.add(histogram)
    return whole
