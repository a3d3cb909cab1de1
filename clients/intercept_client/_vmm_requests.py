"""A VMM's everyday requests, as functions of what it has: ranges, rights, kinds.

Owns building each request and taking the result out of its reply, once for both shells: `_blocking_clients`
and `_trio_clients` make methods of these functions, so their names, parameters and docstrings agree. Must not
do I/O.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Sequence
from typing import Final, Protocol

import msgspec

from intercept_protocol import messages
from intercept_protocol.addresses import GfnRange, UaddrRange
from intercept_protocol.errors import ProtocolViolation, WireError
from intercept_protocol.messages import (
    AddressSpaceKind,
    Architecture,
    HypervisorKind,
    MappingView,
    MmioGranularity,
    OnImageError,
    PartitionCredentials,
    PartitionStatistics,
    RegionKind,
    RegionView,
    Remap,
    RequestedKind,
    RestoreReply,
    RestoreStatistics,
    Translation,
    VmaView,
    VpSelection,
)
from intercept_protocol.messages.vmm import LIST_LIMIT
from intercept_protocol.outcomes import Access, allows

from ._errors import ClientMisuse
from ._exchange import Exchange, Reply, call_exchange, field_exchange
from ._own_memory import OwnMemory
from ._series import Series, pages
from ._trace_ring import TraceRing


class NewRegion(msgspec.Struct, frozen=True, kw_only=True):
    """A region to add: the guest reaches `uaddrs` at `gfns`, which have as many pages."""

    gfns: GfnRange
    uaddrs: UaddrRange
    kind: RequestedKind | RegionKind = RequestedKind.AUTO
    writable: bool
    executable: bool


class DeclaredVma(msgspec.Struct, frozen=True):
    """A VMA to declare: host pages from `start_pfn` on are mapped at `uaddrs`. `io` says that it is device
    memory."""

    uaddrs: UaddrRange
    start_pfn: int
    access: Access
    io: bool = False


def create_partition(
    address_space: AddressSpaceKind,
    hypervisor: HypervisorKind,
    *,
    architecture: Architecture = Architecture.X86_64,
    mmio_granularity: MmioGranularity = MmioGranularity.VMA,
    remap: Remap = Remap.REPLACE,
    deposit_pages: int | None = None,
    invalidate_timeout_ms: int | None = None,
) -> Exchange[PartitionCredentials]:
    """Create this connection's partition; it has one at most, and the partition ends with the connection.

    `deposit_pages` is what the software hypervisor's pool holds at first, in pages; `invalidate_timeout_ms`
    bounds how long an intercept waits for an invalidation to end. None leaves either to the daemon.
    """
    return call_exchange(
        messages.CreatePartition(
            address_space=address_space,
            hypervisor=hypervisor,
            architecture=architecture,
            mmio_granularity=mmio_granularity,
            remap=remap,
            deposit_pages=deposit_pages,
            invalidate_timeout_ms=invalidate_timeout_ms,
        )
    )


HANDOVERS: Final = 3
"""How often memory is handed over before an EAGAIN is the answer."""


def attach_memory(own_memory: OwnMemory, *, promise_begin_end: bool) -> Series[None]:
    """Hand over this process's memory, as `memory.own_memory` opened it; once, before the first region.

    `promise_begin_end` promises that every change of the memory will be announced by begin and end, as the
    functions of `intercept_client.memory` do it. If the daemon was restarted meanwhile, or another obstacle
    may pass (EAGAIN), it is handed over again, up to three times in all, with a new userfaultfd. If there is
    none, the request says why, and the daemon logs it and shows it to operators.
    """
    refusal = own_memory.unwatched_because
    call = messages.AttachMemory(
        promise_begin_end=promise_begin_end, userfaultfd_errno=None if refusal is None else refusal.errno
    )
    yield from _handing_over(
        lambda: call_exchange(call, own_memory.descriptors), own_memory.renew_userfaultfd
    )


def _handing_over(attempt: Callable[[], Exchange[Reply]], renew: Callable[[], None]) -> Series[Reply]:
    """Hand over until the answer is another than EAGAIN, at most `HANDOVERS` times."""
    for _ in range(HANDOVERS - 1):
        try:
            reply: Reply = yield attempt()
        except WireError as refusal:
            if refusal.number != errno.EAGAIN:
                raise
        else:
            return reply
        renew()
    reply = yield attempt()
    return reply


class HasFileno(Protocol):
    """A socket, an open file, or anything else with a descriptor."""

    def fileno(self) -> int:
        """The descriptor."""


def restore(
    image: HasFileno,
    listener: HasFileno,
    *,
    around_pages: int = messages.AROUND_PAGES,
    on_image_error: OnImageError = OnImageError.HOLD,
    connect_timeout: float = 60.0,
    prefetch: HasFileno | None = None,
    trace: TraceRing | None = None,
) -> Series[RestoreReply]:
    """Have the daemon serve the memory of a VMM that will connect to `listener`, and restore from `image`.

    The VMM is one that knows nothing of the daemon, such as Firecracker. The guest gets no partition of this
    connection, which may be closed: the daemon serves it until the VMM ends. `listener` is a listening Unix
    stream socket, at which the daemon waits for `connect_timeout` seconds; then it shuts it down. A first
    touch brings in up to `around_pages` pages. `prefetch` is a file of page runs, each of two u32, little
    endian: the first page and how many. `trace` is written until the guest ends. All descriptors stay the
    caller's to close.

    If the daemon was restarted meanwhile (EAGAIN), they are handed over again, up to three times in all.
    """
    call = messages.Restore(
        around_pages=around_pages,
        on_image_error=on_image_error,
        connect_timeout_ms=round(connect_timeout * 1000),
        prefetch=prefetch is not None,
        trace=trace is not None,
    )
    descriptors = [image.fileno(), listener.fileno()]
    if prefetch is not None:
        descriptors.append(prefetch.fileno())
    if trace is not None:
        descriptors.append(trace.descriptor)
    return (yield from _handing_over(lambda: call_exchange(call, descriptors), lambda: None))


def restore_progress(partition_id: int) -> Exchange[RestoreStatistics]:
    """How far a guest is that `restore` returned: asked by the same user, on any connection of a VMM that has
    no partition. Those that have ended are known for a while."""
    return call_exchange(messages.RestoreProgress(partition_id=partition_id))


def add_region(
    gfns: GfnRange,
    uaddrs: UaddrRange,
    kind: RequestedKind | RegionKind = RequestedKind.AUTO,
    *,
    writable: bool,
    executable: bool,
) -> Exchange[RegionKind]:
    """Let the guest reach `uaddrs` at `gfns`, which have as many pages; returns the kind that the region has.

    A pinned region is mapped when this returns, any other at the first touch.
    """
    region = NewRegion(gfns=gfns, uaddrs=uaddrs, kind=kind, writable=writable, executable=executable)
    return field_exchange(_addition("add_region", region), lambda reply: reply.kind)


def remove_region(gfns: GfnRange, uaddrs: UaddrRange) -> Exchange[None]:
    """Remove the region that was added with exactly these ranges.

    When this returns, the guest reaches nothing of it.
    """
    return call_exchange(_removal(gfns, uaddrs))


def change_regions(
    *, remove: Sequence[tuple[GfnRange, UaddrRange]] = (), add: Sequence[NewRegion] = ()
) -> Exchange[list[RegionKind]]:
    """Remove regions and add others in one step, all or nothing; at most 128 of each, and of both together no
    more than a request may hold: 101 of each. Returns the kinds of the added ones, in order.

    An access that the guest makes meanwhile is answered for the old regions or for the new ones. What both
    give it alike stays mapped. If one is refused, the error's `details` say which: `list` is "remove" or
    "add", and `index` its place, from 0.
    """
    return _region_change("change_regions", remove, add)


def add_regions(regions: Sequence[NewRegion]) -> Exchange[list[RegionKind]]:
    """Add up to 128 regions, all or none, in one request: `change_regions` that removes none."""
    return _region_change("add_regions", (), regions)


def _region_change(
    name: str, remove: Sequence[tuple[GfnRange, UaddrRange]], add: Sequence[NewRegion]
) -> Exchange[list[RegionKind]]:
    for elements in (remove, add):
        if len(elements) > LIST_LIMIT:
            raise ClientMisuse(f"{name}: {len(elements)} regions; a request takes {LIST_LIMIT}")
    call = messages.ChangeRegions(
        remove=[_removal(gfns, uaddrs) for gfns, uaddrs in remove],
        add=[_addition(name, region) for region in add],
    )
    return field_exchange(call, lambda reply: reply.kinds)


def _addition(name: str, region: NewRegion) -> messages.AddRegion:
    gfns, uaddrs = region.gfns, region.uaddrs
    if gfns.page_count != uaddrs.page_count:
        raise ClientMisuse(
            f"{name}: {gfns.page_count} gfns from {gfns.start:#x}, but {uaddrs.page_count} pages at {uaddrs}"
        )
    return messages.AddRegion(
        start_gfn=gfns.start,
        page_count=gfns.page_count,
        start_uaddr=uaddrs.start_uaddr,
        kind=RequestedKind(region.kind),
        writable=region.writable,
        executable=region.executable,
    )


def _removal(gfns: GfnRange, uaddrs: UaddrRange) -> messages.RemoveRegion:
    return messages.RemoveRegion(
        start_gfn=gfns.start, page_count=gfns.page_count, start_uaddr=uaddrs.start_uaddr
    )


def map_vma(uaddrs: UaddrRange, start_pfn: int, access: Access, *, io: bool = False) -> Exchange[None]:
    """Declare a VMA: host pages from `start_pfn` on are mapped at `uaddrs`. It must not overlap another VMA.

    Only in a partition whose address space is declared. `io` says that it is device memory.
    """
    return call_exchange(_declaration(DeclaredVma(uaddrs, start_pfn, access, io)))


def map_vmas(vmas: Sequence[DeclaredVma]) -> Exchange[None]:
    """Declare up to 128 VMAs at once, as `map_vma` does each: all of them, or none if one is refused.

    The error's `details` then say which: `index`, from 0.
    """
    if len(vmas) > LIST_LIMIT:
        raise ClientMisuse(f"map_vmas: {len(vmas)} VMAs; a request takes {LIST_LIMIT}")
    return call_exchange(messages.MapVmas(vmas=[_declaration(vma) for vma in vmas]))


def _declaration(vma: DeclaredVma) -> messages.MapVma:
    return messages.MapVma(
        start_uaddr=vma.uaddrs.start_uaddr,
        page_count=vma.uaddrs.page_count,
        start_pfn=vma.start_pfn,
        readable=allows(vma.access, Access.READ),
        writable=allows(vma.access, Access.WRITE),
        executable=allows(vma.access, Access.EXECUTE),
        io=vma.io,
    )


def unmap_vma(uaddrs: UaddrRange) -> Exchange[None]:
    """Declare that nothing is mapped at `uaddrs` any more.

    When this returns, the guest does not reach what was there.
    """
    return call_exchange(messages.UnmapVma(start_uaddr=uaddrs.start_uaddr, page_count=uaddrs.page_count))


def protect_vma(uaddrs: UaddrRange, access: Access) -> Exchange[None]:
    """Declare new rights for what is mapped at `uaddrs`.

    When this returns, the guest has lost the rights that were taken away.
    """
    return call_exchange(
        messages.ProtectVma(
            start_uaddr=uaddrs.start_uaddr,
            page_count=uaddrs.page_count,
            readable=allows(access, Access.READ),
            writable=allows(access, Access.WRITE),
            executable=allows(access, Access.EXECUTE),
        )
    )


def kick(vp_index: int | VpSelection) -> Exchange[None]:
    """Have the intercept that waits in a VP, or in every VP with `VpSelection.ALL`, answered `KICKED`.

    Where none waits, the kick is kept, once, for that VP's next intercept that would wait.
    """
    return call_exchange(messages.Kick(vp_index=vp_index))


def set_policy(*, mmio_granularity: MmioGranularity | None = None) -> Exchange[None]:
    """Change how the partition maps from now on; what is mapped stays, and so does what is None."""
    return call_exchange(messages.SetPolicy(mmio_granularity=mmio_granularity))


def statistics() -> Exchange[PartitionStatistics]:
    """The partition's counters."""
    return call_exchange(messages.Statistics())


def translate(gfn: int) -> Exchange[Translation | None]:
    """What the guest reaches at a guest page right now; None for nothing.

    Only with the software hypervisor. It is for tests and tools: the answer may be outdated when it arrives.
    """
    return call_exchange(messages.Translate(gfn=gfn))


def prefault(gfns: GfnRange, *, progress: Callable[[int, int], None] | None = None) -> Series[int]:
    """Map what the guest would reach if it had read each page of `gfns`; returns how many it then could read.

    Takes as many requests as are needed, each of which the daemon answers after some 100 ms. After each,
    `progress` is called with the number of pages gone through so far, and of those that the guest could read.
    Pages that no region has, that are not backed or are being invalidated are passed over.
    """
    done, mapped = 0, 0
    while done < gfns.page_count:
        call = messages.Prefault(start_gfn=gfns.start + done, page_count=gfns.page_count - done)
        reply: messages.PrefaultReply = yield call_exchange(call)
        if not 1 <= reply.page_count <= call.page_count:
            raise ProtocolViolation(errno.EPROTO, f"prefault: {reply.page_count} of {call.page_count} pages")
        done, mapped = done + reply.page_count, mapped + reply.mapped_gfns
        if progress is not None:
            progress(done, mapped)
    return mapped


def list_regions() -> Series[list[RegionView]]:
    """Every region, by ascending gfn, in as many requests as it takes."""
    return pages(
        lambda after: messages.ListRegions(after=after),
        lambda page: page.regions,
        lambda region: region.start_gfn,
    )


def list_vmas() -> Series[list[VmaView]]:
    """Every VMA that was declared, by ascending uaddr, in as many requests as it takes.

    Only in a partition whose address space is declared.
    """
    return pages(
        lambda after: messages.ListVmas(after=after),
        lambda page: page.vmas,
        lambda vma: vma.start_uaddr,
    )


def list_mappings() -> Series[list[MappingView]]:
    """What the guest reaches, by ascending gfn, in as many requests as it takes.

    It changes at any time: each request shows its own moment.
    """
    return pages(
        lambda after: messages.ListMappings(after=after),
        lambda page: page.mappings,
        lambda mapping: mapping.start_gfn,
    )
