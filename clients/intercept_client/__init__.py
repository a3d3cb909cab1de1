"""The client library of interceptd: what a VMM or an operator's tool needs to talk to the daemon.

Import from here alone::

    with BlockingVmm.open(path, name="guest") as vmm:
        partition = vmm.create_partition(AddressSpaceKind.PROCESS, HypervisorKind.VMM)

    async with TrioVmm.open(path, name="guest") as vmm:
        partition = await vmm.create_partition(AddressSpaceKind.PROCESS, HypervisorKind.VMM)

Each role has a client for threads, `Blocking...`, and one for trio, `Trio...`, with the same methods. Three
modules have more: `memory` and `trio_memory` change mappings under an invalidation, `libc` has the bare
system calls on addresses that they are made of, and `kvm` is the other half of a VMM on KVM.

Stable from 1.0 on: the names in `__all__`, of this package and of those modules, and the modules of
`intercept_protocol` without an underscore. Until then the changelog lists each change. Modules with an
underscore may change in every version.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from intercept_protocol.addresses import PAGE_SHIFT, PAGE_SIZE, GfnRange, RangeError, UaddrRange
from intercept_protocol.errors import ProtocolViolation, WireError
from intercept_protocol.events import Event, EventName, Reason
from intercept_protocol.hv_message import MESSAGE_SIZE, build_memory_intercept
from intercept_protocol.messages import (
    AddressSpaceKind,
    Architecture,
    DaemonStatistics,
    HelloReply,
    HypervisorKind,
    MappingView,
    MmioGranularity,
    OnImageError,
    PartitionCredentials,
    PartitionInspection,
    PartitionStatistics,
    PartitionSummary,
    RegionKind,
    RegionView,
    Remap,
    RequestedKind,
    RestoreReply,
    RestoreState,
    RestoreStatistics,
    Translation,
    VmaView,
    VpSelection,
)
from intercept_protocol.outcomes import Access, Answer, AnyAnswer, LaterAnswer, Outcome

from ._blocking_clients import BlockingNotifier, BlockingOperator, BlockingVmm, BlockingVp
from ._blocking_hypervisor import BlockingHypervisor, GuestMapper, ListMapper
from ._connecting import LONGEST_SOCKET_PATH
from ._errors import ClientMisuse, ConnectionEnded, ConnectionLost
from ._hypervisor_session import MapRequest, refused_after
from ._own_regions import OwnRegions
from ._showing import show_as_from
from ._trace_ring import RecordsRead, TraceRing
from ._vmm_requests import DeclaredVma, NewRegion

if TYPE_CHECKING:
    __version__: str

    from ._trio_clients import TrioNotifier, TrioOperator, TrioVmm, TrioVp
    from ._trio_hypervisor import AsyncGuestMapper, TrioHypervisor

__all__ = [
    "LONGEST_SOCKET_PATH",
    "MESSAGE_SIZE",
    "PAGE_SHIFT",
    "PAGE_SIZE",
    "Access",
    "AddressSpaceKind",
    "Answer",
    "AnyAnswer",
    "Architecture",
    "AsyncGuestMapper",
    "BlockingHypervisor",
    "BlockingNotifier",
    "BlockingOperator",
    "BlockingVmm",
    "BlockingVp",
    "ClientMisuse",
    "ConnectionEnded",
    "ConnectionLost",
    "DaemonStatistics",
    "DeclaredVma",
    "Event",
    "EventName",
    "GfnRange",
    "GuestMapper",
    "HelloReply",
    "HypervisorKind",
    "LaterAnswer",
    "ListMapper",
    "MapRequest",
    "MappingView",
    "MmioGranularity",
    "NewRegion",
    "OnImageError",
    "Outcome",
    "OwnRegions",
    "PartitionCredentials",
    "PartitionInspection",
    "PartitionStatistics",
    "PartitionSummary",
    "ProtocolViolation",
    "RangeError",
    "Reason",
    "RecordsRead",
    "RegionKind",
    "RegionView",
    "Remap",
    "RequestedKind",
    "RestoreReply",
    "RestoreState",
    "RestoreStatistics",
    "TraceRing",
    "Translation",
    "TrioHypervisor",
    "TrioNotifier",
    "TrioOperator",
    "TrioVmm",
    "TrioVp",
    "UaddrRange",
    "VmaView",
    "VpSelection",
    "WireError",
    "build_memory_intercept",
    "refused_after",
]

_OF_TRIO = {
    "AsyncGuestMapper": "._trio_hypervisor",
    "TrioHypervisor": "._trio_hypervisor",
    "TrioNotifier": "._trio_clients",
    "TrioOperator": "._trio_clients",
    "TrioVmm": "._trio_clients",
    "TrioVp": "._trio_clients",
}
"""Imported when first used: a program of threads does not pay for trio."""


show_as_from(__name__, [value for name, value in globals().items() if name in __all__])

if not TYPE_CHECKING:  # a type checker would take any name for one of these

    def __getattr__(name: str) -> object:
        if name == "__version__":  # takes as long to import as all the rest
            return import_module("importlib.metadata").version("interceptd")
        if name not in _OF_TRIO:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(import_module(_OF_TRIO[name], __name__), name)
        show_as_from(__name__, [value])
        globals()[name] = value
        return value
