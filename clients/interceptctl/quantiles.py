"""From latency buckets seen at two moments to what half, or 99 of 100, of the intercepts in between took.

Owns the arithmetic: pure. A bucket says between which two powers of two a time lies, so a quantile is said as
the upper end of its bucket: "at most".
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest

import msgspec

Counts = Sequence[int]
"""Of the buckets of one histogram (protocol, O-8)."""


class Quantiles(msgspec.Struct, frozen=True):
    """At most how long half, and 99 of 100, of some intercepts took; None of none."""

    p50_ns: int | None = None
    p99_ns: int | None = None


def quantiles(then: Counts, now: Counts) -> Quantiles:
    """Of what was counted in between."""
    counted = [max(0, later - earlier) for earlier, later in zip_longest(then, now, fillvalue=0)]
    return Quantiles(_quantile_ns(counted, 0.5), _quantile_ns(counted, 0.99))


def at_once(all_counts: Counts, waited: Counts) -> list[int]:
    """The buckets of those that did not wait: all less those that did (O-14)."""
    return [max(0, every - some) for every, some in zip_longest(all_counts, waited, fillvalue=0)]


def _quantile_ns(counts: Counts, share: float) -> int | None:
    """At most how long the fastest `share` took.

    Bucket n ends at 2^(n+1) us (protocol, O-8); the last has no end, and is given the one that it would have.
    """
    wanted = share * sum(counts)
    counted = 0
    for bucket, count in enumerate(counts):
        counted += count
        if count and counted >= wanted:
            return 1000 << (bucket + 1)
    return None
