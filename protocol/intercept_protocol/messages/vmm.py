"""A VMM's requests about its partition.

Owns those requests and their replies; must not know how one is carried out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar, Final

import msgspec
from msgspec import Meta

from .base import U32, U64, AfterRestart, Call, Errno
from .enums import (
    AddressSpaceKind,
    Architecture,
    HypervisorKind,
    MmioGranularity,
    RegionKind,
    Remap,
    RequestedKind,
    VpSelection,
)
from .inspection import MappingPage, RegionPage, VmaPage
from .restore import Restore, RestoreProgress
from .statistics import PartitionStatistics

LIST_LIMIT = 128
"""Elements in a list of a request. All fields of 128 regions or VMAs fit into a request (F-6)."""


class PartitionCredentials(msgspec.Struct, frozen=True, kw_only=True):
    """What opens a partition's other connections. The token is a secret: it lets its holder attach VPs."""

    partition_id: int
    token: bytes


ADDRESS_SPACES: Final = (AddressSpaceKind.DECLARED, AddressSpaceKind.PROCESS)
HYPERVISORS: Final = (HypervisorKind.SOFTWARE, HypervisorKind.VMM)
"""What `create_partition` takes; the others are of `restore`."""


class CreatePartition(Call[PartitionCredentials], frozen=True, kw_only=True, forbid_unknown_fields=True):
    METHOD: ClassVar[str] = "create_partition"
    REPLY: ClassVar[object] = PartitionCredentials
    RESTART: ClassVar[AfterRestart] = "logged"

    address_space: Annotated[AddressSpaceKind, Meta(extra={"choices": ADDRESS_SPACES})]
    hypervisor: Annotated[HypervisorKind, Meta(extra={"choices": HYPERVISORS})]
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
    RESTART: ClassVar[AfterRestart] = "logged"

    start_gfn: U64
    page_count: U64
    start_uaddr: U64
    kind: RequestedKind
    writable: bool
    executable: bool


class RemoveRegion(Call[None], frozen=True, kw_only=True, forbid_unknown_fields=True):
    METHOD: ClassVar[str] = "remove_region"
    REPLY: ClassVar[object] = None
    RESTART: ClassVar[AfterRestart] = "logged"

    start_gfn: U64
    page_count: U64
    start_uaddr: U64


class ChangeRegionsReply(msgspec.Struct, frozen=True, kw_only=True):
    """`kinds` has those of the added regions, in order."""

    kinds: list[RegionKind]


class ChangeRegions(Call[ChangeRegionsReply], frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Remove regions and add others in one step, all or nothing."""

    METHOD: ClassVar[str] = "change_regions"
    REPLY: ClassVar[object] = ChangeRegionsReply
    RESTART: ClassVar[AfterRestart] = "logged"

    remove: Annotated[list[RemoveRegion], Meta(max_length=LIST_LIMIT)] = msgspec.field(default_factory=list)
    add: Annotated[list[AddRegion], Meta(max_length=LIST_LIMIT)] = msgspec.field(default_factory=list)


class MapVma(Call[None], frozen=True, kw_only=True, forbid_unknown_fields=True):
    METHOD: ClassVar[str] = "map_vma"
    REPLY: ClassVar[object] = None
    RESTART: ClassVar[AfterRestart] = "logged"

    start_uaddr: U64
    page_count: U64
    start_pfn: U64
    readable: bool
    writable: bool
    executable: bool
    io: bool


class MapVmas(Call[None], frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All or nothing."""

    METHOD: ClassVar[str] = "map_vmas"
    REPLY: ClassVar[object] = None
    RESTART: ClassVar[AfterRestart] = "logged"

    vmas: Annotated[list[MapVma], Meta(max_length=LIST_LIMIT)]


class UnmapVma(Call[None], frozen=True, kw_only=True, forbid_unknown_fields=True):
    METHOD: ClassVar[str] = "unmap_vma"
    REPLY: ClassVar[object] = None
    RESTART: ClassVar[AfterRestart] = "logged"

    start_uaddr: U64
    page_count: U64


class ProtectVma(Call[None], frozen=True, kw_only=True, forbid_unknown_fields=True):
    METHOD: ClassVar[str] = "protect_vma"
    REPLY: ClassVar[object] = None
    RESTART: ClassVar[AfterRestart] = "logged"

    start_uaddr: U64
    page_count: U64
    readable: bool
    writable: bool
    executable: bool


class AttachMemory(Call[None], frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The first byte carries, by SCM_RIGHTS, the VMM's maps, and optionally smaps and a userfaultfd."""

    METHOD: ClassVar[str] = "attach_memory"
    REPLY: ClassVar[object] = None
    RESTART: ClassVar[AfterRestart] = "logged"

    promise_begin_end: bool | None = None
    userfaultfd_errno: Errno | None = None


class Kick(Call[None], frozen=True, kw_only=True, forbid_unknown_fields=True):
    METHOD: ClassVar[str] = "kick"
    REPLY: ClassVar[object] = None
    RESTART: ClassVar[AfterRestart] = "repeatable"

    vp_index: U32 | VpSelection


class SetPolicy(Call[None], frozen=True, kw_only=True, forbid_unknown_fields=True):
    METHOD: ClassVar[str] = "set_policy"
    REPLY: ClassVar[object] = None
    RESTART: ClassVar[AfterRestart] = "repeatable"

    mmio_granularity: MmioGranularity | None = None


class Statistics(Call[PartitionStatistics], frozen=True, kw_only=True, forbid_unknown_fields=True):
    METHOD: ClassVar[str] = "statistics"
    REPLY: ClassVar[object] = PartitionStatistics
    RESTART: ClassVar[AfterRestart] = "repeatable"


class Translation(msgspec.Struct, frozen=True, kw_only=True):
    """What the guest can access at a gfn: the frame, and the access bits r 1, w 2, x 4."""

    frame: tuple[object, int]
    access: int
    pfn: int | None = None


class Translate(Call[Translation | None], frozen=True, kw_only=True, forbid_unknown_fields=True):
    METHOD: ClassVar[str] = "translate"
    REPLY: ClassVar[object] = Translation | None
    RESTART: ClassVar[AfterRestart] = "repeatable"

    gfn: U64


class PrefaultReply(msgspec.Struct, frozen=True, kw_only=True):
    """How many pages from the first were gone through, and how many of those the guest could then read."""

    page_count: int
    mapped_gfns: int


class Prefault(Call[PrefaultReply], frozen=True, kw_only=True, forbid_unknown_fields=True):
    METHOD: ClassVar[str] = "prefault"
    REPLY: ClassVar[object] = PrefaultReply
    RESTART: ClassVar[AfterRestart] = "repeatable"

    start_gfn: U64
    page_count: U64


class ListRegions(Call[RegionPage], frozen=True, kw_only=True, forbid_unknown_fields=True):
    METHOD: ClassVar[str] = "list_regions"
    REPLY: ClassVar[object] = RegionPage
    RESTART: ClassVar[AfterRestart] = "repeatable"

    after: U64 | None = None
    """The last element's `start_gfn`; absent for the first page."""


class ListVmas(Call[VmaPage], frozen=True, kw_only=True, forbid_unknown_fields=True):
    METHOD: ClassVar[str] = "list_vmas"
    REPLY: ClassVar[object] = VmaPage
    RESTART: ClassVar[AfterRestart] = "repeatable"

    after: U64 | None = None
    """The last element's `start_uaddr`; absent for the first page."""


class ListMappings(Call[MappingPage], frozen=True, kw_only=True, forbid_unknown_fields=True):
    METHOD: ClassVar[str] = "list_mappings"
    REPLY: ClassVar[object] = MappingPage
    RESTART: ClassVar[AfterRestart] = "repeatable"

    after: U64 | None = None
    """The last element's `start_gfn`; absent for the first page."""


VmmCall = (
    CreatePartition | Restore | RestoreProgress
    | AddRegion | RemoveRegion | ChangeRegions | MapVma | MapVmas | UnmapVma | ProtectVma
    | AttachMemory | Kick | SetPolicy | Statistics | Translate | Prefault
    | ListRegions | ListVmas | ListMappings
)  # fmt: skip
VMM_METHODS: Mapping[str, type[VmmCall]] = {
    call.METHOD: call
    for call in (
        CreatePartition, Restore, RestoreProgress,
        AddRegion, RemoveRegion, ChangeRegions, MapVma, MapVmas, UnmapVma, ProtectVma,
        AttachMemory, Kick, SetPolicy, Statistics, Translate, Prefault,
        ListRegions, ListVmas, ListMappings,
    )
}  # fmt: skip
