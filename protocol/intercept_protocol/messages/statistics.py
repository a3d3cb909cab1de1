"""What is counted and timed, as the answers hold it.

Owns those forms; must not know who asks for them, or who counts.
"""

from __future__ import annotations

from typing import ClassVar

import msgspec

LATENCY_BUCKETS = 24
"""Of a latency histogram; `HistogramPage.boundaries_ns` says where they end."""
Buckets = tuple[int, ...]
"""Counts of one latency histogram, the shortest times first; empty from a server that has none."""


class PartitionStatistics(msgspec.Struct, frozen=True, kw_only=True):
    """Counters of one partition since it was created; gauges are named without a verb."""

    regions: int
    vmas: int
    vps: int
    open_invalidations: int
    mapped_gfns: int
    no_access_gfns: int
    slat_extents: int
    map_calls: int
    unmap_calls: int
    deposits: int
    invalidations: int
    stale_attempts: int
    intercepts: dict[str, dict[str, int]]
    latency: Buckets = ()
    """Of the intercepts of all its VPs that are or were."""
    latency_waited: Buckets = ()
    """Of those among them that waited for an invalidation to end, or another's map or unmap."""


class DaemonStatistics(msgspec.Struct, frozen=True, kw_only=True):
    """Counters of the daemon since it started, over all partitions; gauges are named without a verb."""

    uptime_ms: int
    partitions: int
    vps: int
    connections: int
    connections_without_hello: int
    tasks: int
    partitions_created: int
    partitions_lost: int
    connections_refused: int
    intercepts: dict[str, dict[str, int]]
    invalidations: int
    latency: Buckets = ()
    """Of the intercepts of all partitions that are or were."""
    latency_waited: Buckets = ()
    """Of those among them that waited for somebody else."""


class VpHistogram(msgspec.Struct, frozen=True, kw_only=True):
    """How long the intercepts of one VP took since it attached; their times add up to `total_ns`.

    Those that waited for somebody else are counted once more, in `waited_buckets` and `waited_ns`.
    """

    vp_index: int
    intercepts: int
    total_ns: int
    buckets: Buckets
    waited_ns: int = 0
    waited_buckets: Buckets = ()


class HistogramPage(msgspec.Struct, frozen=True, kw_only=True):
    """One page of a partition's VPs, by ascending index; `more` says that another page follows the last one.

    `boundaries_ns` are the times at which each bucket but the last ends and the next begins.
    """

    PAGE: ClassVar[int] = 64

    boundaries_ns: tuple[int, ...]
    virtual_processors: list[VpHistogram]
    more: bool
