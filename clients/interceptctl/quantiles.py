"""From latency buckets seen at two moments to what half, or 99 of 100, of the intercepts in between took.

Owns the arithmetic: pure. A bucket says between which two powers of two a time lies, so a quantile is said as
the upper end of its bucket: "at most".
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest


def quantile_ns(then: Sequence[int], now: Sequence[int], share: float) -> int | None:
    """At most how long the fastest `share` took of what was counted in between; None of nothing.

    Bucket n ends at 2^(n+1) us (protocol, O-8); the last has no end, and is given the one that it would have.
    """
    counts = [max(0, later - earlier) for earlier, later in zip_longest(then, now, fillvalue=0)]
    wanted = share * sum(counts)
    counted = 0
    for bucket, count in enumerate(counts):
        counted += count
        if count and counted >= wanted:
            return 1000 << (bucket + 1)
    return None
