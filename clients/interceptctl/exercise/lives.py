"""The counters of one partition, whose daemon was started several times.

Owns which figures are counters, and adding them up: pure.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest

import msgspec

from intercept_protocol.messages import PartitionStatistics
from interceptctl.quantiles import Counts


def added(lives: Sequence[PartitionStatistics]) -> PartitionStatistics:
    """The counters that the exercise shows, of all of them; everything else is as the last one says."""
    return msgspec.structs.replace(
        lives[-1],
        map_calls=sum(life.map_calls for life in lives),
        invalidations=sum(life.invalidations for life in lives),
        stale_attempts=sum(life.stale_attempts for life in lives),
        latency=_sums([life.latency for life in lives]),
        latency_waited=_sums([life.latency_waited for life in lives]),
    )


def _sums(histograms: Sequence[Counts]) -> list[int]:
    return [sum(counts) for counts in zip_longest(*histograms, fillvalue=0)]
