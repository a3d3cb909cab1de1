"""The operator's views of partitions: a list, and one partition in full.

Owns those views; must not know how they are made or shown. Enumerated fields are plain text here: a later
version may have other values, which the operator's tool shows unchanged.
"""

from __future__ import annotations

from typing import ClassVar

import msgspec

from .statistics import Buckets, PartitionStatistics


class PartitionSummary(msgspec.Struct, frozen=True, kw_only=True):
    """One partition in a list: its owner, how it was created, and its most important counters."""

    partition_id: int
    name: str
    uid: int
    pid: int
    address_space: str
    hypervisor: str
    vps: int
    regions: int
    mapped_gfns: int
    intercepts: int
    invalidations: int
    age_ms: int
    latency: Buckets = ()
    """Of the intercepts of all its VPs, past and present."""
    latency_waited: Buckets = ()
    """Of those intercepts that waited for other work."""


class PartitionList(msgspec.Struct, frozen=True, kw_only=True):
    """One page of the partitions, by ascending id; `more` says whether another page follows."""

    PAGE: ClassVar[int] = 64

    partitions: list[PartitionSummary]
    more: bool


class RegionView(msgspec.Struct, frozen=True, kw_only=True):
    start_gfn: int
    page_count: int
    start_uaddr: int
    kind: str
    state: str
    writable: bool
    executable: bool
    mapped_gfns: int


class VpView(msgspec.Struct, frozen=True, kw_only=True):
    vp_index: int
    state: str
    intercepts: int


class PartitionInspection(msgspec.Struct, frozen=True, kw_only=True):
    """One partition in full. `regions` has up to `REGION_VIEWS` entries; the statistics count all."""

    REGION_VIEWS: ClassVar[int] = 256

    summary: PartitionSummary
    architecture: str
    mmio_granularity: str
    statistics: PartitionStatistics
    regions: list[RegionView]
    virtual_processors: list[VpView]
