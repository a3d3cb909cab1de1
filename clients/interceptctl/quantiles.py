"""P50 and P99 latency between two snapshots of the latency buckets.

Owns the arithmetic: pure. A bucket spans two adjacent powers of two, so a quantile is reported as the upper
bound of its bucket.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest

import msgspec

Counts = Sequence[int]
"""The bucket counts of one histogram (protocol, O-8)."""


class Quantiles(msgspec.Struct, frozen=True):
    """Upper bounds of the median and of the 99th percentile; None if there were no intercepts."""

    p50_ns: int | None = None
    p99_ns: int | None = None


def quantiles(then: Counts, now: Counts) -> Quantiles:
    """The quantiles of what was counted between `then` and `now`."""
    counted = [max(0, later - earlier) for earlier, later in zip_longest(then, now, fillvalue=0)]
    return Quantiles(_quantile_ns(counted, 0.5), _quantile_ns(counted, 0.99))


def at_once(all_counts: Counts, waited: Counts) -> list[int]:
    """The buckets of the intercepts that did not wait: all minus those that did (O-14)."""
    return [max(0, every - some) for every, some in zip_longest(all_counts, waited, fillvalue=0)]


def _quantile_ns(counts: Counts, share: float) -> int | None:
    """An upper bound on the time that the fastest `share` took.

    Bucket n ends at 2^(n+1) us (protocol, O-8). The last is unbounded, and treated as if it ended there too.
    """
    wanted = share * sum(counts)
    counted = 0
    for bucket, count in enumerate(counts):
        counted += count
        if count and counted >= wanted:
            return 1000 << (bucket + 1)
    return None
