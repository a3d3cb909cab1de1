"""An operator's requests to the daemon.

Owns those requests; must not know how one is carried out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from intercept_protocol.events import EventName, Reason

from .base import U32, U64, AfterRestart, Call
from .enums import MmioGranularity
from .inspection import MappingPage, PartitionInspection, PartitionList, RegionPage, TraceBegun, VmaPage
from .statistics import DaemonStatistics, HistogramPage


class ListPartitions(Call[PartitionList], frozen=True, kw_only=True, forbid_unknown_fields=True):
    METHOD: ClassVar[str] = "list_partitions"
    REPLY: ClassVar[object] = PartitionList
    RESTART: ClassVar[AfterRestart] = "repeatable"

    after: U64 = 0


class InspectPartition(Call[PartitionInspection], frozen=True, kw_only=True, forbid_unknown_fields=True):
    METHOD: ClassVar[str] = "inspect_partition"
    REPLY: ClassVar[object] = PartitionInspection
    RESTART: ClassVar[AfterRestart] = "repeatable"

    partition_id: U64


class OperatorStatistics(Call[DaemonStatistics], frozen=True, kw_only=True, forbid_unknown_fields=True):
    METHOD: ClassVar[str] = "statistics"
    REPLY: ClassVar[object] = DaemonStatistics
    RESTART: ClassVar[AfterRestart] = "repeatable"


class Histograms(Call[HistogramPage], frozen=True, kw_only=True, forbid_unknown_fields=True):
    METHOD: ClassVar[str] = "histograms"
    REPLY: ClassVar[object] = HistogramPage
    RESTART: ClassVar[AfterRestart] = "repeatable"

    partition_id: U64
    after: U32 | None = None
    """A vp_index; absent for the first page."""


class OperatorSetPolicy(Call[None], frozen=True, kw_only=True, forbid_unknown_fields=True):
    METHOD: ClassVar[str] = "set_policy"
    REPLY: ClassVar[object] = None
    RESTART: ClassVar[AfterRestart] = "repeatable"

    partition_id: U64
    mmio_granularity: MmioGranularity | None = None


class Drain(Call[None], frozen=True, kw_only=True, forbid_unknown_fields=True):
    METHOD: ClassVar[str] = "drain"
    REPLY: ClassVar[object] = None
    RESTART: ClassVar[AfterRestart] = "repeatable"

    timeout_ms: U32


class Restart(Call[None], frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Exchange the daemon for its successor, which goes on with all partitions."""

    METHOD: ClassVar[str] = "restart"
    REPLY: ClassVar[object] = None
    RESTART: ClassVar[AfterRestart] = "repeatable"


class Subscribe(Call[None], frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Replaces this connection's earlier subscription; an empty `events` ends it."""

    METHOD: ClassVar[str] = "subscribe"
    REPLY: ClassVar[object] = None
    RESTART: ClassVar[AfterRestart] = "repeatable"

    events: list[EventName]
    partition_id: U64 | None = None
    vp_index: U32 | None = None
    reasons: list[Reason] | None = None


class OperatorListRegions(Call[RegionPage], frozen=True, kw_only=True, forbid_unknown_fields=True):
    METHOD: ClassVar[str] = "list_regions"
    REPLY: ClassVar[object] = RegionPage
    RESTART: ClassVar[AfterRestart] = "repeatable"

    partition_id: U64
    after: U64 | None = None


class OperatorListVmas(Call[VmaPage], frozen=True, kw_only=True, forbid_unknown_fields=True):
    METHOD: ClassVar[str] = "list_vmas"
    REPLY: ClassVar[object] = VmaPage
    RESTART: ClassVar[AfterRestart] = "repeatable"

    partition_id: U64
    after: U64 | None = None


class OperatorListMappings(Call[MappingPage], frozen=True, kw_only=True, forbid_unknown_fields=True):
    METHOD: ClassVar[str] = "list_mappings"
    REPLY: ClassVar[object] = MappingPage
    RESTART: ClassVar[AfterRestart] = "repeatable"

    partition_id: U64
    after: U64 | None = None


class Trace(Call[TraceBegun], frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Record a partition into the ring whose descriptor comes along, until this connection ends."""

    METHOD: ClassVar[str] = "trace"
    REPLY: ClassVar[object] = TraceBegun
    RESTART: ClassVar[AfterRestart] = "repeatable"

    partition_id: U64


OperatorCall = (
    ListPartitions | InspectPartition | OperatorStatistics | Histograms
    | OperatorSetPolicy | Drain | Restart | Subscribe
    | OperatorListRegions | OperatorListVmas | OperatorListMappings | Trace
)  # fmt: skip
OPERATOR_METHODS: Mapping[str, type[OperatorCall]] = {
    call.METHOD: call
    for call in (
        ListPartitions, InspectPartition, OperatorStatistics, Histograms, OperatorSetPolicy, Drain, Restart,
        Subscribe, OperatorListRegions, OperatorListVmas, OperatorListMappings, Trace,
    )
}  # fmt: skip
