"""Every request and reply of the wire, typed.

Owns names, fields, types and defaults; must not know how a request is carried out. `codec` checks
field by field and names the one that is wrong. Integers are u64 on the wire, so only their sign is checked
here; what a value may be in context (overlap, limits) is the service's to say.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Annotated, ClassVar, Generic, Literal, TypeVar

import msgspec
from msgspec import Meta

from .events import EventName, Reason

PROTOCOL_VERSION = 1

U64 = Annotated[int, Meta(ge=0)]
"""MessagePack has nothing above 2^64 - 1, so the upper bound needs no check."""
U32 = Annotated[int, Meta(ge=0, le=2**32 - 1)]
Token = Annotated[bytes, Meta(min_length=16, max_length=16)]
Name = Annotated[str, Meta(max_length=64, pattern="^[^\x00-\x1f\x7f-\x9f]*$")]
"""No control characters: it is shown on terminals."""

Reply = TypeVar("Reply")


class RegionKind(StrEnum):
    """How the frames of a region may change."""

    MMIO = "mmio"
    MOVABLE = "movable"
    PINNED = "pinned"


class AddressSpaceKind(StrEnum):
    DECLARED = "declared"
    PROCESS = "process"


class HypervisorKind(StrEnum):
    SOFTWARE = "software"
    VMM = "vmm"


class Architecture(StrEnum):
    X86_64 = "x86_64"
    ARM64 = "arm64"

    __hash__ = str.__hash__
    """An enum's own hash runs in Python, once an intercept."""


class MmioGranularity(StrEnum):
    """How much of an MMIO region one first touch maps."""

    VMA = "vma"
    PAGE = "page"


class Remap(StrEnum):
    """What the software hypervisor does when an accessible gfn is mapped again."""

    REPLACE = "replace"
    ERROR = "error"


class Fields(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=False):
    """A map of named fields on the wire."""


class Call(Fields, Generic[Reply], frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A request; its type parameter is what a successful answer holds."""

    METHOD: ClassVar[str]
    REPLY: ClassVar[object]


# ---------------------------------------------------------------- hello


class HelloReply(msgspec.Struct, frozen=True, kw_only=True):
    protocol: int
    server: str
    version: str
    limits: dict[str, int]
    features: dict[str, object]


class _Hello(Call[HelloReply], frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="role"):
    METHOD: ClassVar[str] = "hello"
    REPLY: ClassVar[object] = HelloReply

    protocol: U64 = PROTOCOL_VERSION


class HelloVmm(_Hello, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="vmm"):
    name: Name = ""


class HelloVp(_Hello, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="vp"):
    partition_id: U64
    vp_index: U32
    token: Token


class HelloNotifier(_Hello, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="notifier"):
    partition_id: U64
    token: Token


class HelloHypervisor(_Hello, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="hypervisor"):
    partition_id: U64
    token: Token


class HelloOperator(_Hello, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="operator"):
    pass


Hello = HelloVmm | HelloVp | HelloNotifier | HelloHypervisor | HelloOperator
PartitionHello = HelloVp | HelloNotifier | HelloHypervisor
"""The hellos that join a partition that is already there."""

HELLOS: Mapping[str, type[Hello]] = {
    "vmm": HelloVmm,
    "vp": HelloVp,
    "notifier": HelloNotifier,
    "hypervisor": HelloHypervisor,
    "operator": HelloOperator,
}
"""By role."""


# ---------------------------------------------------------------- vmm


class CreatePartitionReply(msgspec.Struct, frozen=True, kw_only=True):
    partition_id: int
    token: bytes


class CreatePartition(Call[CreatePartitionReply], frozen=True, kw_only=True, forbid_unknown_fields=True):
    METHOD: ClassVar[str] = "create_partition"
    REPLY: ClassVar[object] = CreatePartitionReply

    address_space: AddressSpaceKind
    hypervisor: HypervisorKind
    architecture: Architecture = Architecture.X86_64
    mmio_granularity: MmioGranularity = MmioGranularity.VMA
    remap: Remap = Remap.REPLACE
    deposit_pages: U32 | None = None
    invalidate_timeout_ms: Annotated[int, Meta(ge=1, le=2**32 - 1)] | None = None


class AddRegionReply(msgspec.Struct, frozen=True, kw_only=True):
    kind: RegionKind


class AddRegion(Call[AddRegionReply], frozen=True, kw_only=True, forbid_unknown_fields=True):
    METHOD: ClassVar[str] = "add_region"
    REPLY: ClassVar[object] = AddRegionReply

    start_gfn: U64
    page_count: U64
    start_uaddr: U64
    kind: Literal["auto", "mmio", "movable", "pinned"]
    writable: bool
    executable: bool


class RemoveRegion(Call[None], frozen=True, kw_only=True, forbid_unknown_fields=True):
    METHOD: ClassVar[str] = "remove_region"
    REPLY: ClassVar[object] = None

    start_gfn: U64
    page_count: U64
    start_uaddr: U64


class MapVma(Call[None], frozen=True, kw_only=True, forbid_unknown_fields=True):
    METHOD: ClassVar[str] = "map_vma"
    REPLY: ClassVar[object] = None

    start_uaddr: U64
    page_count: U64
    start_pfn: U64
    readable: bool
    writable: bool
    executable: bool
    io: bool


class UnmapVma(Call[None], frozen=True, kw_only=True, forbid_unknown_fields=True):
    METHOD: ClassVar[str] = "unmap_vma"
    REPLY: ClassVar[object] = None

    start_uaddr: U64
    page_count: U64


class ProtectVma(Call[None], frozen=True, kw_only=True, forbid_unknown_fields=True):
    METHOD: ClassVar[str] = "protect_vma"
    REPLY: ClassVar[object] = None

    start_uaddr: U64
    page_count: U64
    readable: bool
    writable: bool
    executable: bool


class AttachMemory(Call[None], frozen=True, kw_only=True, forbid_unknown_fields=True):
    """With SCM_RIGHTS on the request's first byte: the VMM's maps, and optionally smaps and a userfaultfd."""

    METHOD: ClassVar[str] = "attach_memory"
    REPLY: ClassVar[object] = None

    promise_begin_end: bool | None = None


class Kick(Call[None], frozen=True, kw_only=True, forbid_unknown_fields=True):
    METHOD: ClassVar[str] = "kick"
    REPLY: ClassVar[object] = None

    vp_index: U32 | Literal["all"]


class SetPolicy(Call[None], frozen=True, kw_only=True, forbid_unknown_fields=True):
    METHOD: ClassVar[str] = "set_policy"
    REPLY: ClassVar[object] = None

    mmio_granularity: MmioGranularity | None = None


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


class Statistics(Call[PartitionStatistics], frozen=True, kw_only=True, forbid_unknown_fields=True):
    METHOD: ClassVar[str] = "statistics"
    REPLY: ClassVar[object] = PartitionStatistics


class Translation(msgspec.Struct, frozen=True, kw_only=True):
    """What the guest would reach at a gfn: the frame and the access bits r 1, w 2, x 4."""

    frame: tuple[object, int]
    access: int
    pfn: int | None = None


class Translate(Call[Translation | None], frozen=True, kw_only=True, forbid_unknown_fields=True):
    METHOD: ClassVar[str] = "translate"
    REPLY: ClassVar[object] = Translation | None

    gfn: U64


# ---------------------------------------------------------------- notifier


class InvalidateBegin(Call[None], frozen=True, kw_only=True, forbid_unknown_fields=True):
    METHOD: ClassVar[str] = "invalidate_begin"
    REPLY: ClassVar[object] = None

    start_uaddr: U64
    length: U64


class InvalidateEnd(Call[None], frozen=True, kw_only=True, forbid_unknown_fields=True):
    METHOD: ClassVar[str] = "invalidate_end"
    REPLY: ClassVar[object] = None

    start_uaddr: U64
    length: U64


class Invalidate(Call[None], frozen=True, kw_only=True, forbid_unknown_fields=True):
    METHOD: ClassVar[str] = "invalidate"
    REPLY: ClassVar[object] = None

    start_uaddr: U64
    length: U64


# ---------------------------------------------------------------- hypervisor (the daemon asks)


class MapGpa(Call[None], frozen=True, kw_only=True, forbid_unknown_fields=True):
    METHOD: ClassVar[str] = "map_gpa"
    REPLY: ClassVar[object] = None

    start_gfn: U64
    page_count: U64
    start_uaddr: U64
    start_pfn: U64 | None = None
    access: U32


class UnmapGpa(Call[None], frozen=True, kw_only=True, forbid_unknown_fields=True):
    METHOD: ClassVar[str] = "unmap_gpa"
    REPLY: ClassVar[object] = None

    start_gfn: U64
    page_count: U64


# ---------------------------------------------------------------- operator

LATENCY_BUCKETS = 24
"""Of a latency histogram; `Histograms` says where they end."""
Buckets = tuple[int, ...]
"""Counts of one latency histogram, the shortest times first; empty from a server that has none."""


class PartitionSummary(msgspec.Struct, frozen=True, kw_only=True):
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
    """Of the intercepts of all its VPs that are or were."""


class PartitionList(msgspec.Struct, frozen=True, kw_only=True):
    """One page of the partitions, by ascending id; `more` says that another page follows the last one."""

    PAGE: ClassVar[int] = 64

    partitions: list[PartitionSummary]
    more: bool


class ListPartitions(Call[PartitionList], frozen=True, kw_only=True, forbid_unknown_fields=True):
    METHOD: ClassVar[str] = "list_partitions"
    REPLY: ClassVar[object] = PartitionList

    after: U64 = 0


class RegionView(msgspec.Struct, frozen=True, kw_only=True):
    start_gfn: int
    page_count: int
    start_uaddr: int
    kind: RegionKind
    state: str
    writable: bool
    executable: bool
    mapped_gfns: int


class VpView(msgspec.Struct, frozen=True, kw_only=True):
    vp_index: int
    state: str
    intercepts: int


class PartitionInspection(msgspec.Struct, frozen=True, kw_only=True):
    """One partition in full; `regions` is cut to `REGION_VIEWS`, the statistics say how many there are."""

    REGION_VIEWS: ClassVar[int] = 256

    summary: PartitionSummary
    architecture: Architecture
    mmio_granularity: MmioGranularity
    statistics: PartitionStatistics
    regions: list[RegionView]
    virtual_processors: list[VpView]


class InspectPartition(Call[PartitionInspection], frozen=True, kw_only=True, forbid_unknown_fields=True):
    METHOD: ClassVar[str] = "inspect_partition"
    REPLY: ClassVar[object] = PartitionInspection

    partition_id: U64


class DaemonStatistics(msgspec.Struct, frozen=True, kw_only=True):
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


class OperatorStatistics(Call[DaemonStatistics], frozen=True, kw_only=True, forbid_unknown_fields=True):
    METHOD: ClassVar[str] = "statistics"
    REPLY: ClassVar[object] = DaemonStatistics


class VpHistogram(msgspec.Struct, frozen=True, kw_only=True):
    """How long the intercepts of one VP took since it attached; their times add up to `total_ns`."""

    vp_index: int
    intercepts: int
    total_ns: int
    buckets: Buckets


class HistogramPage(msgspec.Struct, frozen=True, kw_only=True):
    """One page of a partition's VPs, by ascending index; `more` says that another page follows the last one.

    `boundaries_ns` are the times at which each bucket but the last ends and the next begins.
    """

    PAGE: ClassVar[int] = 128

    boundaries_ns: tuple[int, ...]
    virtual_processors: list[VpHistogram]
    more: bool


class Histograms(Call[HistogramPage], frozen=True, kw_only=True, forbid_unknown_fields=True):
    METHOD: ClassVar[str] = "histograms"
    REPLY: ClassVar[object] = HistogramPage

    partition_id: U64
    after: U32 | None = None
    """A vp_index; absent for the first page."""


class OperatorSetPolicy(Call[None], frozen=True, kw_only=True, forbid_unknown_fields=True):
    METHOD: ClassVar[str] = "set_policy"
    REPLY: ClassVar[object] = None

    partition_id: U64
    mmio_granularity: MmioGranularity | None = None


class Drain(Call[None], frozen=True, kw_only=True, forbid_unknown_fields=True):
    METHOD: ClassVar[str] = "drain"
    REPLY: ClassVar[object] = None

    timeout_ms: U32


class Subscribe(Call[None], frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Instead of what this connection subscribed to before; no events: of nothing any more."""

    METHOD: ClassVar[str] = "subscribe"
    REPLY: ClassVar[object] = None

    events: list[EventName]
    partition_id: U64 | None = None
    vp_index: U32 | None = None
    reasons: list[Reason] | None = None


VmmCall = (
    CreatePartition | AddRegion | RemoveRegion | MapVma | UnmapVma | ProtectVma
    | AttachMemory | Kick | SetPolicy | Statistics | Translate
)  # fmt: skip
NotifierCall = InvalidateBegin | InvalidateEnd | Invalidate
HypervisorCall = MapGpa | UnmapGpa
OperatorCall = (
    ListPartitions | InspectPartition | OperatorStatistics | Histograms
    | OperatorSetPolicy | Drain | Subscribe
)  # fmt: skip

VMM_METHODS: Mapping[str, type[VmmCall]] = {
    call.METHOD: call
    for call in (
        CreatePartition, AddRegion, RemoveRegion, MapVma, UnmapVma, ProtectVma,
        AttachMemory, Kick, SetPolicy, Statistics, Translate,
    )
}  # fmt: skip
NOTIFIER_METHODS: Mapping[str, type[NotifierCall]] = {
    call.METHOD: call for call in (InvalidateBegin, InvalidateEnd, Invalidate)
}
HYPERVISOR_METHODS: Mapping[str, type[HypervisorCall]] = {call.METHOD: call for call in (MapGpa, UnmapGpa)}
OPERATOR_METHODS: Mapping[str, type[OperatorCall]] = {
    call.METHOD: call
    for call in (
        ListPartitions, InspectPartition, OperatorStatistics, Histograms, OperatorSetPolicy, Drain, Subscribe,
    )
}  # fmt: skip
INTERCEPT_METHOD = "intercept"
"""The one method without named fields: its parameter is the 256 raw bytes."""
