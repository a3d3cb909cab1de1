"""Counters and latency histograms, as replies hold them.

Owns those types; must not know who requests them, nor who counts.
"""

from __future__ import annotations

from typing import ClassVar

import msgspec

LATENCY_BUCKETS = 24
"""The number of buckets of a latency histogram; `HistogramPage.boundaries_ns` has their bounds."""
Buckets = tuple[int, ...]
"""Counts of one latency histogram, shortest durations first; empty from a server without histograms."""


class RestoreStatistics(msgspec.Struct, frozen=True, kw_only=True):
    """Of one restored guest. Counts of pages are of 4 KiB and since the hand-over, unless the daemon was
    restarted."""

    state: str
    """A `RestoreState`, unless a later daemon has others."""
    image_pages: int
    pages_in: int
    """Pages of the guest that have their content, of the image or zero."""
    demand_pages: int
    """Brought in because the guest touched them."""
    around_pages: int
    """Brought in with a neighbour that the guest touched."""
    prefetched_pages: int
    zero_pages: int
    """Of those brought in: zero, because the VMM had given the page back."""
    removed_pages: int
    """What the VMM has given back, at any time."""
    faults: int
    retries: int
    """Times that the kernel refused because the VMM's memory was changing (EAGAIN)."""
    image_errors: int
    """Reads of the image that failed."""
    age_ms: int = 0
    """Since the hand-over."""
    first_fault_ms: int | None = None
    """From the hand-over to the first fault."""
    quiet_ms: int | None = None
    """From the hand-over to the last fault so far."""
    pid: int = 0
    """Of the VMM; 0 before the hand-over, or if it has none in the daemon's pid namespace."""
    error: str = ""
    """Why it ended or waits; empty if nothing is wrong."""
    latency: Buckets = ()
    """Of its faults."""
    oldest_fault_ms: int = 0
    """How long that fault has waited for its page which waits longest; 0 if none waits."""


class PartitionStatistics(msgspec.Struct, frozen=True, kw_only=True):
    """One partition: gauges of its current state, and counters since the later of its creation and the
    daemon's last restart."""

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
    split_large_pages: int = 0
    """0 from a server that does not count them."""
    restarts: int = 0
    """Of the daemon, which the partition survived; 0 from a server that does not survive one."""
    intercepts: dict[str, dict[str, int]]
    unresolved: dict[str, int] = {}
    """How many look-ups for faults found nothing to map, by cause."""
    latency: Buckets = ()
    """Of the intercepts of all its VPs, past and present."""
    latency_waited: Buckets = ()
    """Of those intercepts that waited for an invalidation to end, or for another task's map or unmap."""
    restore: RestoreStatistics | None = None
    """Of a guest whose memory comes from an image."""


class DaemonStatistics(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
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
    """Of the intercepts of all partitions, past and present."""
    latency_waited: Buckets = ()
    """Of those intercepts that waited for other work."""
    scrapes: int | None = None
    """How often the metrics were fetched; None if none are served, or from a server that does not say it."""


class VpHistogram(msgspec.Struct, frozen=True, kw_only=True):
    """Durations of the intercepts of one VP since it attached; `total_ns` is their sum.

    Those that waited for other work are also counted in `waited_buckets` and `waited_ns`.
    """

    vp_index: int
    intercepts: int
    total_ns: int
    buckets: Buckets
    waited_ns: int = 0
    waited_buckets: Buckets = ()


class HistogramPage(msgspec.Struct, frozen=True, kw_only=True):
    """One page of a partition's VPs, by ascending index; `more` says whether another page follows.

    `boundaries_ns` are the upper bounds of the buckets, except the last.
    """

    PAGE: ClassVar[int] = 64

    boundaries_ns: tuple[int, ...]
    virtual_processors: list[VpHistogram]
    more: bool
