"""Views of partitions: the operator's list, one partition in full, and what a partition consists of.

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
    watch: str = ""
    """A `MemoryWatch`; empty from a server that does not say it."""
    open_invalidations: int = 0
    """0, as those below, from a server that does not say it."""
    oldest_invalidation_ms: int = 0
    """How long that has been open which is open longest."""
    waiting_vps: int = 0
    """VPs whose intercept waits for something now."""
    memory_bytes: int = 0
    """Of the daemon's memory, by its estimate."""
    restore: str = ""
    """A `RestoreState`; empty for another partition. One that waits for its VMM is no partition yet."""


class PartitionList(msgspec.Struct, frozen=True, kw_only=True):
    """One page of the partitions, by ascending id; `more` says whether another page follows."""

    PAGE: ClassVar[int] = 64

    partitions: list[PartitionSummary]
    more: bool


class RegionView(msgspec.Struct, frozen=True, kw_only=True):
    """A region, and how many of its gfns are mapped; `start_uaddr` is in bytes."""

    start_gfn: int
    page_count: int
    start_uaddr: int
    kind: str
    state: str
    writable: bool
    executable: bool
    mapped_gfns: int


class RegionPage(msgspec.Struct, frozen=True, kw_only=True):
    """One page of a partition's regions, by ascending gfn; `more` says whether another page follows."""

    PAGE: ClassVar[int] = 256

    regions: list[RegionView]
    more: bool


class VmaView(msgspec.Struct, frozen=True, kw_only=True):
    """Pages of the VMM as it declared them; `start_uaddr` is in bytes, `io` says that it is device memory."""

    start_uaddr: int
    page_count: int
    start_pfn: int
    readable: bool
    writable: bool
    executable: bool
    io: bool


class VmaPage(msgspec.Struct, frozen=True, kw_only=True):
    """One page of the VMAs that a VMM declared, by ascending uaddr."""

    PAGE: ClassVar[int] = 256

    vmas: list[VmaView]
    more: bool


class MappingView(msgspec.Struct, frozen=True, kw_only=True):
    """Gfns that the guest reaches, with the frame of the first, and the access bits r 1, w 2, x 4."""

    start_gfn: int
    page_count: int
    start_uaddr: int
    frame: tuple[str, int]
    access: int


class MappingPage(msgspec.Struct, frozen=True, kw_only=True):
    """One page of what a guest reaches, by ascending gfn."""

    PAGE: ClassVar[int] = 256

    mappings: list[MappingView]
    more: bool


class TraceBegun(msgspec.Struct, frozen=True, kw_only=True):
    """What the numbers in a ring of records stand for."""

    records: int
    """How many the ring holds."""
    record_size: int
    answers: tuple[tuple[str, str], ...]
    sources: tuple[str, ...]
    region_kinds: tuple[str, ...]


class VpView(msgspec.Struct, frozen=True, kw_only=True):
    vp_index: int
    state: str
    intercepts: int


class PartitionInspection(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One partition in full. `regions` has up to `REGION_VIEWS` entries; the statistics count all."""

    REGION_VIEWS: ClassVar[int] = 256

    summary: PartitionSummary
    architecture: str
    mmio_granularity: str
    statistics: PartitionStatistics
    regions: list[RegionView]
    virtual_processors: list[VpView]
    notifiers: int | None = None
    """Notifier connections. None, as below, from a server that does not say it."""
    hypervisor_connected: bool | None = None
    """With the VMM's own hypervisor."""
    userfaultfd_errno: int | None = None
    """With which the VMM was refused a userfaultfd, if it said so."""
