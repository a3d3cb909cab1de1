"""Latency histograms: how long things took, in 24 buckets that double.

Owns the buckets' bounds, which are those of QEMU's postcopy-latency-dist (10.1, `BLOCKTIME_LATENCY_BUCKET_N`
in migration/postcopy-ram.c): bucket n counts [2^n us, 2^(n+1) us), the first also what is shorter and the
last what is longer. Pure counting; must not know what is timed, or who reads it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from intercept_protocol.messages import LATENCY_BUCKETS

BOUNDARIES_NS: Final = tuple(1000 << n for n in range(1, LATENCY_BUCKETS))
"""Where each bucket but the last ends and the next begins, in nanoseconds: from 2 us to 2^23 us (8.4 s)."""
_WIDTHS: Final = 65
"""Bit lengths that a 64-bit number has, 0 included."""


class LatencyHistogram:
    """Counts of durations, and their sum. To record one takes a fifth of a microsecond."""

    __slots__ = ("_by_width", "total_ns")

    def __init__(self) -> None:
        self._by_width = [0] * _WIDTHS
        """By the bit length of the duration in whole microseconds: what is read seldom is folded then."""
        self.total_ns = 0

    def record(self, nanoseconds: int) -> None:
        """Count one duration, not negative and below 2^64 us."""
        self.total_ns += nanoseconds
        self._by_width[(nanoseconds // 1000).bit_length()] += 1

    def add(self, other: LatencyHistogram) -> None:
        """Count all that `other` counted."""
        self.total_ns += other.total_ns
        for width, count in enumerate(other._by_width):
            self._by_width[width] += count

    @property
    def count(self) -> int:
        return sum(self._by_width)

    @property
    def buckets(self) -> tuple[int, ...]:
        """The counts, shortest durations first."""
        shorter, *middle = self._by_width[1:LATENCY_BUCKETS]
        longer = sum(self._by_width[LATENCY_BUCKETS:])
        return (self._by_width[0] + shorter, *middle, longer)


def total(histograms: Iterable[LatencyHistogram]) -> LatencyHistogram:
    """A new histogram of all that these counted."""
    whole = LatencyHistogram()
    for histogram in histograms:
        whole.add(histogram)
    return whole
