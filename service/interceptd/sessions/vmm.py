"""What a VMM may ask of its partition.

Owns the `vmm` methods, one line each or a helper; those about regions are in `region_calls`. The caller owns
the partition's lifetime and the connection.
"""

from __future__ import annotations

import errno
from collections.abc import Awaitable, Callable, Coroutine
from functools import partial

import structlog

from intercept_protocol import messages
from intercept_protocol.addresses import GfnRange, Pfn, PfnRange, UaddrRange
from intercept_protocol.elements import about_element
from intercept_protocol.errors import WireError, unwatched
from intercept_protocol.events import PolicySet
from intercept_protocol.messages import MemoryWatch, VmmCall, VpSelection
from interceptd.address_space import Undecided
from interceptd.address_space.declared import DeclaredAddressSpace, Vma
from interceptd.address_space.descriptors import attach
from interceptd.address_space.handover import Handover
from interceptd.address_space.process import ProcessAddressSpace
from interceptd.connections.received_fds import ReceivedFds
from interceptd.connections.request_loop import Reply
from interceptd.ledger.records import Policy
from interceptd.memory.prefault import prefault
from interceptd.pages.mapping import HOST_BACKING
from interceptd.partition.partition import Partition
from interceptd.sessions import views
from interceptd.sessions.region_calls import RegionCalls, access_of
from interceptd.telemetry.counters import Source

log = structlog.get_logger()


class VmmSession:
    """Answers one VMM's calls, one at a time."""

    def __init__(self, partition: Partition, descriptors: ReceivedFds) -> None:
        self._partition = partition
        self._descriptors = descriptors
        self._regions = RegionCalls(partition)

    def answer(self, call: VmmCall) -> Reply | Coroutine[object, object, Reply]:
        match call:
            case messages.CreatePartition() | messages.Restore() | messages.RestoreProgress():
                raise WireError(errno.EEXIST, "this connection has a partition already")
            case messages.AddRegion() | messages.RemoveRegion() | messages.ChangeRegions():
                return self._regions.answer(call)
            case messages.MapVma():
                self._declared().map_vma(vma_of(call))
            case messages.MapVmas():
                self._map_vmas(call)
            case messages.UnmapVma():
                return self._unmap_vma(call)
            case messages.ProtectVma():
                return self._protect_vma(call)
            case messages.AttachMemory():
                return self._attach_memory(call)
            case messages.Kick():
                return kick(self._partition, call)
            case messages.SetPolicy():
                set_policy(self._partition, call)
            case messages.Prefault():
                return self._prefault(GfnRange.of(call.start_gfn, call.page_count))
            case _:
                return self._view(call)
        return None

    def _view(
        self,
        call: messages.Statistics
        | messages.Translate
        | messages.ListRegions
        | messages.ListVmas
        | messages.ListMappings,
    ) -> Reply | Coroutine[object, object, Reply]:
        """What changes nothing."""
        match call:
            case messages.Statistics():
                return self._partition.statistics()
            case messages.Translate():
                return self._translate(call.gfn)
            case messages.ListRegions():
                return views.region_page(self._partition, call.after)
            case messages.ListVmas():
                return views.vma_page(self._partition, call.after)
            case messages.ListMappings():
                return views.mapping_page(self._partition, call.after)

    def _map_vmas(self, call: messages.MapVmas) -> None:
        declared = self._declared()
        vmas = []
        for index, each in enumerate(call.vmas):
            with about_element("vmas", index):
                vmas.append(vma_of(each))
        declared.map_vmas(vmas)

    async def _protect_vma(self, call: messages.ProtectVma) -> None:
        access = access_of(readable=call.readable, writable=call.writable, executable=call.executable)
        uaddrs = UaddrRange.of_pages(call.start_uaddr, call.page_count)
        edit = partial(self._declared().protect_vma, uaddrs, access)
        await self._invalidating(uaddrs, Source.PROTECT_VMA, edit)

    async def _unmap_vma(self, call: messages.UnmapVma) -> None:
        uaddrs = UaddrRange.of_pages(call.start_uaddr, call.page_count)
        edit = partial(self._declared().unmap_vma, uaddrs)
        await self._invalidating(uaddrs, Source.UNMAP_VMA, edit)

    async def _invalidating(
        self, uaddrs: UaddrRange, source: Source, edit: Callable[[], Awaitable[None]]
    ) -> None:
        """Attempts go stale first, in the step that opens the range; then the VMAs are edited, the guest's
        mappings taken away, the range closed, and the VMM answered."""
        batch = self._partition.notifier.begin(uaddrs, source)
        try:
            await edit()
            await self._partition.regions.wait_served(batch)
        finally:
            self._partition.notifier.end(uaddrs, source)

    async def _attach_memory(self, call: messages.AttachMemory) -> None:
        memory = self._partition.memory
        if not isinstance(memory, ProcessAddressSpace):
            raise WireError(errno.EINVAL, "memory is attached only with address_space process")
        if memory.attached:
            raise WireError(errno.EEXIST, "memory is attached already")
        closer = self._partition.tenant.closer
        closer.require_room()
        received, descriptors = self._descriptors.received, self._descriptors.take()
        examine = partial(
            attach,
            received=received,
            peer=self._partition.owner,
            promised=bool(call.promise_begin_end),
            closer=closer,
        )
        try:
            await memory.take(Handover(descriptors, examine, closer))
        except Undecided as error:
            raise WireError(error.number, f"attach_memory: {error}") from None
        memory.userfaultfd_errno = call.userfaultfd_errno
        if memory.watch is MemoryWatch.NONE:
            log.warning("memory_not_watched", error=_why_not_watched(call.userfaultfd_errno))

    def _translate(self, gfn: int) -> messages.Translation | None:
        mapping = self._partition.hypervisor.translate(gfn)
        frame = None if mapping is None else mapping.frame_at(gfn)
        if mapping is None or frame is None:
            return None
        pfn = Pfn(frame.page) if frame.backing == HOST_BACKING else None
        return messages.Translation(frame=(frame.backing, frame.page), access=int(mapping.access), pfn=pfn)

    async def _prefault(self, gfns: GfnRange) -> messages.PrefaultReply:
        done = await prefault(gfns, self._partition.faults, self._partition.regions)
        return messages.PrefaultReply(page_count=done.page_count, mapped_gfns=done.mapped_gfns)

    def _declared(self) -> DeclaredAddressSpace:
        return views.declared(self._partition)


def _why_not_watched(userfaultfd_errno: int | None) -> str:
    """Of a VMM without a userfaultfd that promised nothing: none of its memory will be mapped."""
    if userfaultfd_errno is None:
        cause = "the VMM handed over no userfaultfd"
    else:
        cause = f"the VMM was refused a userfaultfd ({unwatched(userfaultfd_errno)})"
    return f"{cause} and promises no begin and end: nothing is mapped"


async def kick(partition: Partition, call: messages.Kick) -> None:
    """Raises ENOENT for a VP that is not attached."""
    if call.vp_index is VpSelection.ALL:
        await partition.kick_all()
    elif not partition.kick(call.vp_index):
        raise WireError(errno.ENOENT, f"no VP {call.vp_index} is attached", vp_index=call.vp_index)


def set_policy(partition: Partition, call: messages.SetPolicy | messages.OperatorSetPolicy) -> None:
    """Change what was given, for faults from now on."""
    if call.mmio_granularity is not None:
        partition.regions.mmio_granularity = call.mmio_granularity
        if partition.journal is not None:
            partition.journal.append(Policy(call.mmio_granularity.value))
        log.info(
            "policy_set", partition_id=partition.partition_id, mmio_granularity=call.mmio_granularity.value
        )
        partition.event_bus.publish(PolicySet(mmio_granularity=call.mmio_granularity))


def vma_of(call: messages.MapVma) -> Vma:
    uaddrs = UaddrRange.of_pages(call.start_uaddr, call.page_count)
    PfnRange.of(call.start_pfn, call.page_count)  # the host's page numbers may not wrap either
    access = access_of(readable=call.readable, writable=call.writable, executable=call.executable)
    return Vma(uaddrs.start, uaddrs.end, call.start_pfn, access, call.io)
