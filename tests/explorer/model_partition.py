"""A partition in model mode without sockets: the real parts, joined as the daemon joins them.

Owns the wiring and short verbs in pages for what a VMM and its VPs do. The ports are recorded and pause where
they are told to. Must not know what is right.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Mapping
from contextlib import AbstractContextManager, asynccontextmanager, nullcontext
from dataclasses import dataclass
from typing import Self

import trio

from intercept_protocol import messages
from intercept_protocol.addresses import PAGE_SHIFT, UaddrRange
from intercept_protocol.messages import (
    AddressSpaceKind,
    CreatePartition,
    HypervisorKind,
    MmioGranularity,
    RegionKind,
    Remap,
    RequestedKind,
)
from intercept_protocol.outcomes import Access, Answer
from interceptd.address_space.declared import DeclaredAddressSpace, Vma
from interceptd.config.schema import Limits
from interceptd.connections.peer import Peer
from interceptd.connections.received_fds import ReceivedFds
from interceptd.connections.request_loop import Reply
from interceptd.connections.tenants import Tenants
from interceptd.hypervisor.hv_status import HvStatus
from interceptd.memory.fault_handler import Fault, FaultHandler
from interceptd.memory.guest_mappings import GuestMappings
from interceptd.memory.known_vmas import KnownVmas
from interceptd.memory.region_manager import RegionManager
from interceptd.mmu_notifier import MmuNotifier
from interceptd.pages.mapping import Mapping as MappedPages
from interceptd.partition.partition import Partition
from interceptd.partition.virtual_processor import VirtualProcessor
from interceptd.sessions.vmm import VmmSession
from interceptd.telemetry.counters import Source
from interceptd.telemetry.event_bus import EventBus, PartitionPublisher

from .failing_hypervisor import FailingHypervisor
from .kept_log import KeptLog, LoggedCall
from .pauses import Pauses
from .ports import RecordedAddressSpace, RecordedHypervisor

RW = Access.READ | Access.WRITE
TIMEOUT = 5.0
"""Seconds, virtual in tests, that an intercept may take."""

VMM = Peer(pid=1, uid=0, gid=0)


@dataclass(frozen=True)
class Parts:
    """The classes that a partition is made of: the daemon's own, or one of them with something taken out."""

    regions: type[RegionManager] = RegionManager
    mappings: type[GuestMappings] = GuestMappings
    notifier: type[MmuNotifier] = MmuNotifier
    faults: type[FaultHandler] = FaultHandler
    known: type[KnownVmas] = KnownVmas
    processor: type[VirtualProcessor] = VirtualProcessor
    session: type[VmmSession] = VmmSession
    address_space: type[DeclaredAddressSpace] = DeclaredAddressSpace
    hypervisor: type[FailingHypervisor] = FailingHypervisor
    log: type[KeptLog] = KeptLog


async def touch(
    faults: FaultHandler,
    gfn: int,
    access: Access,
    interrupted: Callable[[Answer], Answer | None] = lambda _: None,
) -> Answer:
    """One access, from the look-up to its answer."""
    match faults.lookup(gfn, access):
        case MappedPages():
            return Answer.ALREADY_MAPPED
        case Answer() as answer:
            return answer
        case found:
            return await faults.handle(Fault(gfn, access, found), interrupted)


class ModelPartition:
    """Ranges are given as first page and page count, of gfns or of the VMM's pages. What changes is recorded
    in `log`, if there is one."""

    def __init__(
        self,
        *,
        pauses: Pauses,
        parts: Parts = Parts(),
        remap: Remap = Remap.REPLACE,
        failing_calls: Mapping[int, HvStatus] | None = None,
        vma_limit: int = 1 << 20,
        partition_id: int = 1,
        log: KeptLog | None = None,
    ) -> None:
        self._log = log
        self.tenant = Tenants(Limits).of(VMM.uid)
        self.declared = parts.address_space(lambda: vma_limit, self.tenant.vmas)
        self.address_space = RecordedAddressSpace(self.declared, pauses)
        self.software = parts.hypervisor(
            remap=remap, pool_pages=256, pool_limit=lambda: 1 << 20, failing_calls=failing_calls, journal=log
        )
        self.hypervisor = RecordedHypervisor(self.software, pauses)
        self.event_bus = EventBus()
        event_bus = PartitionPublisher(self.event_bus, partition_id)
        self.notifier = parts.notifier(open_limit=lambda: 64, event_bus=event_bus, journal=log)
        self.mappings = parts.mappings(self.hypervisor, lambda: 1 << 20, self.tenant.mappings)
        self.regions = parts.regions(
            mappings=self.mappings,
            notifier=self.notifier,
            region_limit=lambda: 4096,
            quota=self.tenant.regions,
            mmio_granularity=MmioGranularity.VMA,
            event_bus=event_bus,
            journal=log,
        )
        self.known = parts.known()
        self.faults = parts.faults(self.regions, self.address_space, TIMEOUT, self.known)
        self.partition = Partition(
            partition_id=partition_id,
            name="model",
            owner=VMM,
            tenant=self.tenant,
            request=CreatePartition(
                address_space=AddressSpaceKind.DECLARED, hypervisor=HypervisorKind.SOFTWARE
            ),
            address_space=self.address_space,
            memory=self.declared,
            hypervisor=self.hypervisor,
            table=self.software.table,
            link=None,
            notifier=self.notifier,
            regions=self.regions,
            faults=self.faults,
            event_bus=event_bus,
            end_timeout=lambda: TIMEOUT,
        )
        self._session = parts.session(self.partition, ReceivedFds(self.tenant.closer))

    @asynccontextmanager
    async def running(self) -> AsyncIterator[Self]:
        """With the region manager's task; cancelled at the end."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.regions.run)
            yield self
            nursery.cancel_scope.cancel()

    # ------------------------------------------------ what a VMM does

    async def _ask(self, call: messages.VmmCall) -> Reply:
        with self._recorded(call) as replies:
            result = self._session.answer(call)
            replies.append(await result if isinstance(result, Coroutine) else result)
        return replies[0]

    def _recorded(self, call: LoggedCall) -> AbstractContextManager[list[Reply]]:
        return nullcontext([]) if self._log is None else self._log.carrying_out(call)

    async def map_vma(
        self, page: int, page_count: int, pfn: int, access: Access = RW, *, io: bool = False
    ) -> None:
        await self._ask(
            messages.MapVma(
                start_uaddr=page << PAGE_SHIFT,
                page_count=page_count,
                start_pfn=pfn,
                readable=Access.READ in access,
                writable=Access.WRITE in access,
                executable=Access.EXECUTE in access,
                io=io,
            )
        )

    async def unmap_vma(self, page: int, page_count: int) -> None:
        await self._ask(messages.UnmapVma(start_uaddr=page << PAGE_SHIFT, page_count=page_count))

    def map_fixed(self, page: int, page_count: int, pfn: int) -> None:
        """What a VMM may do with live memory between a begin and an end: replace it without another word."""
        uaddrs = UaddrRange.at_page(page, page_count)
        where = {"start_uaddr": uaddrs.start_uaddr, "page_count": page_count, "start_pfn": pfn}
        gone = messages.UnmapVma(start_uaddr=uaddrs.start_uaddr, page_count=page_count)
        there = messages.MapVma(**where, readable=True, writable=True, executable=False, io=False)
        with self._recorded(gone) as replies:
            self.declared._vmas.carve(uaddrs)
            replies.append(None)
        with self._recorded(there) as replies:
            self.declared.map_vma(Vma(page, page + page_count, pfn, RW, io=False))
            replies.append(None)

    async def protect_vma(self, page: int, page_count: int, access: Access) -> None:
        await self._ask(
            messages.ProtectVma(
                start_uaddr=page << PAGE_SHIFT,
                page_count=page_count,
                readable=Access.READ in access,
                writable=Access.WRITE in access,
                executable=Access.EXECUTE in access,
            )
        )

    async def add_region(
        self,
        gfn: int,
        page_count: int,
        page: int,
        kind: RegionKind | None = RegionKind.MMIO,
        access: Access = RW,
    ) -> RegionKind:
        """`kind` None is `auto`; returns the kind that it became."""
        reply = await self._ask(addition(gfn, page_count, page, kind, access))
        assert isinstance(reply, messages.AddRegionReply)
        return reply.kind

    async def remove_region(self, gfn: int, page_count: int, page: int) -> None:
        await self._ask(removal(gfn, page_count, page))

    async def change_regions(
        self, remove: Iterable[messages.RemoveRegion] = (), add: Iterable[messages.AddRegion] = ()
    ) -> list[RegionKind]:
        """Of what `removal` and `addition` say; returns the kinds."""
        reply = await self._ask(messages.ChangeRegions(remove=list(remove), add=list(add)))
        assert isinstance(reply, messages.ChangeRegionsReply)
        return reply.kinds

    async def prefault(self, gfn: int, page_count: int) -> tuple[int, int]:
        """One request: how many pages were gone through, and how many of them the guest could read."""
        reply = await self._ask(messages.Prefault(start_gfn=gfn, page_count=page_count))
        assert isinstance(reply, messages.PrefaultReply)
        return reply.page_count, reply.mapped_gfns

    async def begin(self, page: int, page_count: int) -> None:
        """An invalidate_begin, from the request to the acknowledgement."""
        uaddrs = UaddrRange.at_page(page, page_count)
        call = messages.InvalidateBegin(start_uaddr=uaddrs.start_uaddr, length=page_count << PAGE_SHIFT)
        with self._recorded(call) as replies:
            await self.regions.wait_served(self.notifier.begin(uaddrs, ring=False))
            replies.append(None)

    def end(self, page: int, page_count: int) -> None:
        uaddrs = UaddrRange.at_page(page, page_count)
        call = messages.InvalidateEnd(start_uaddr=uaddrs.start_uaddr, length=page_count << PAGE_SHIFT)
        with self._recorded(call) as replies:
            self.notifier.end(uaddrs)
            replies.append(None)

    async def invalidate(self, page: int, page_count: int, source: Source = Source.NOTIFIER) -> None:
        uaddrs = UaddrRange.at_page(page, page_count)
        await self.regions.wait_served(self.notifier.invalidate(uaddrs, source, ring=False))

    async def invalidate_each(self, pages: Iterable[int]) -> None:
        """Announced one by one without waiting, as a userfaultfd does, and then waited for."""
        batches = {
            self.notifier.invalidate(UaddrRange.at_page(page, 1), Source.USERFAULTFD) for page in pages
        }
        for batch in batches:
            await batch.done.wait()

    # ------------------------------------------------ what a guest does

    async def fault(self, gfn: int, access: Access = Access.READ) -> Answer:
        """One access, handled as for a VP that no kick waits for."""
        return await touch(self.faults, gfn, access)

    def pfn(self, gfn: int) -> int | None:
        """What the guest reaches at `gfn`."""
        frame = self.hypervisor.frame(gfn)
        return None if frame is None else frame.page

    def pfns(self, gfn: int, page_count: int) -> list[int | None]:
        return [self.pfn(page) for page in range(gfn, gfn + page_count)]


def addition(
    gfn: int,
    page_count: int,
    page: int,
    kind: RegionKind | None = RegionKind.MMIO,
    access: Access = RW,
) -> messages.AddRegion:
    """The region that a VMM asks for; `kind` None is `auto`."""
    return messages.AddRegion(
        start_gfn=gfn,
        page_count=page_count,
        start_uaddr=page << PAGE_SHIFT,
        kind=RequestedKind.AUTO if kind is None else RequestedKind(kind),
        writable=Access.WRITE in access,
        executable=Access.EXECUTE in access,
    )


def removal(gfn: int, page_count: int, page: int) -> messages.RemoveRegion:
    """The region that a VMM wants to be gone."""
    return messages.RemoveRegion(start_gfn=gfn, page_count=page_count, start_uaddr=page << PAGE_SHIFT)
