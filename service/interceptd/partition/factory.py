"""Builds a partition as a VMM has requested it.

Owns the choice of the ports and the wiring of the parts. Must not know roles or methods.
"""

from __future__ import annotations

import errno
import math
import random
from collections.abc import Callable
from functools import partial

from intercept_protocol.errors import WireError
from intercept_protocol.messages import AddressSpaceKind, CreatePartition, HypervisorKind, Restore
from interceptd.address_space import AddressSpace
from interceptd.address_space.declared import DeclaredAddressSpace
from interceptd.address_space.image import ImageAddressSpace
from interceptd.address_space.image_file import Image
from interceptd.address_space.missing_faults import MissingFaults
from interceptd.address_space.process import ProcessAddressSpace
from interceptd.address_space.turn_queue import TurnQueue
from interceptd.address_space.workers import Workers
from interceptd.config.live import Settings
from interceptd.connections.connection import Connection
from interceptd.connections.peer import Peer
from interceptd.connections.tenants import Tenant
from interceptd.hypervisor import Hypervisor
from interceptd.hypervisor.measured import MeasuredHypervisor
from interceptd.hypervisor.remote import RemoteHypervisor
from interceptd.hypervisor.slat import SoftwareSlat
from interceptd.hypervisor.software import DEPOSIT_PAGES, SoftwareHypervisor
from interceptd.hypervisor.userfaultfd import UserfaultfdHypervisor
from interceptd.ledger.journal import Journal
from interceptd.memory.fault_handler import FaultHandler, Known
from interceptd.memory.guest_mappings import GuestMappings
from interceptd.memory.known_vmas import KnownVmas
from interceptd.memory.region_manager import RegionManager
from interceptd.memory_budget import CacheShare, Cost
from interceptd.mmu_notifier import MmuNotifier
from interceptd.partition.chaos import Chaos, ChaoticAddressSpace, ChaoticHypervisor
from interceptd.partition.completion import Completion
from interceptd.partition.fault_reader import FaultReader
from interceptd.partition.handed_over import HandedOver, parts_of, regions_of
from interceptd.partition.keeping import Keeping
from interceptd.partition.partition import Memory, Partition
from interceptd.partition.restored_guest import RestoredGuest
from interceptd.telemetry.counters import PortCalls
from interceptd.telemetry.event_bus import EventBus, PartitionPublisher


class PartitionFactory:
    """`chaos` is how many extra checkpoints a port call may take at most; 0 for none."""

    def __init__(self, settings: Settings, chaos: int, event_bus: EventBus) -> None:
        self._settings = settings
        self._event_bus = event_bus
        self._turns = TurnQueue()
        self._chaos = Chaos(chaos, random.Random()) if chaos else None

    def create(
        self,
        request: CreatePartition,
        name: str,
        connection: Connection,
        partition_id: int,
        keeping: Keeping | None = None,
    ) -> Partition:
        """Raises ENOSPC for more deposited pages than a partition may have."""
        built = self._hypervisor(request, None if keeping is None else keeping.journal)
        port_calls = PortCalls()
        hypervisor: Hypervisor = MeasuredHypervisor(built, port_calls)
        if self._chaos is not None:
            hypervisor = ChaoticHypervisor(hypervisor, self._chaos)
        return self._partition(
            request,
            hypervisor,
            partial(self._memory, request, vmm=connection, partition_id=partition_id, kept=keeping),
            partition_id=partition_id,
            name=name,
            owner=connection.peer,
            tenant=connection.tenant,
            table=built.table,
            link=built if isinstance(built, RemoteHypervisor) else None,
            keeping=keeping,
            port_calls=port_calls,
        )

    def restore(
        self,
        options: Restore,
        vmm: HandedOver,
        *,
        partition_id: int,
        name: str,
        tenant: Tenant,
        image: Image,
        workers: Workers,
        keeping: Keeping | None = None,
    ) -> Partition:
        """A partition whose guest's memory comes from `image`, for the VMM that has handed it over. `workers`
        may wait for the image. There is no chaos in its hypervisor, whose call is one step with the look at
        what belongs behind the page."""
        ioctls = Workers(1, f"memory of {partition_id}", tenant.closer)
        uffd = MissingFaults(vmm.userfaultfd, ioctls, unit=vmm.unit)
        journal = None
        if keeping is not None:
            uffd.read_into(keeping.event)
            journal = keeping.journal
        port_calls = PortCalls()
        hypervisor = UserfaultfdHypervisor(uffd, image, journal, unit=vmm.unit, port_calls=port_calls)
        regions = regions_of(vmm, options.around_pages)

        def image_failed(error: OSError) -> None:
            guest.image_failed(error)

        memory = ImageAddressSpace(
            image, workers, parts_of(vmm), quota=tenant.vmas, unit=vmm.unit, on_failure=image_failed
        )
        partition = self._partition(
            CreatePartition(address_space=AddressSpaceKind.IMAGE, hypervisor=HypervisorKind.USERFAULTFD),
            hypervisor,
            lambda *_: memory,
            partition_id=partition_id,
            name=name,
            owner=vmm.peer,
            tenant=tenant,
            table=hypervisor.table,
            keeping=keeping,
            port_calls=port_calls,
        )
        reader = FaultReader(
            uffd,
            regions=regions,
            faults=partition.faults,
            notifier=partition.notifier,
            memory=memory,
            hypervisor=hypervisor,
            answers=partition.answers,
            event_bus=partition.event_bus,
        )
        guest = RestoredGuest(
            options,
            vmm,
            regions,
            image_pages=image.pages,
            workers=(ioctls, workers),
            memory=memory,
            hypervisor=hypervisor,
            reader=reader,
            completion=Completion(regions, memory, hypervisor, partition.event_bus),
            event_bus=partition.event_bus,
        )
        partition.restored = guest
        return partition

    def _partition(
        self,
        request: CreatePartition,
        hypervisor: Hypervisor,
        make_memory: Callable[[MmuNotifier, GuestMappings, float, CacheShare], Memory],
        *,
        partition_id: int,
        name: str,
        owner: Peer,
        tenant: Tenant,
        table: SoftwareSlat,
        port_calls: PortCalls,
        link: RemoteHypervisor | None = None,
        keeping: Keeping | None = None,
    ) -> Partition:
        """What all partitions have, around their ports."""
        settings = self._settings
        journal = None if keeping is None else keeping.journal
        event_bus = PartitionPublisher(self._event_bus, partition_id)
        notifier = MmuNotifier(
            lambda: settings.now.limits.open_invalidations_per_partition,
            event_bus,
            journal,
            tenant.invalidations,
        )
        timeout = (request.invalidate_timeout_ms or settings.now.timeouts.invalidate_ms) / 1000
        mappings = GuestMappings(
            hypervisor, lambda: settings.now.limits.mappings_per_partition, tenant.mappings
        )
        caches = [CacheShare(tenant.memory, Cost.CACHED_VMA) for _ in range(2)]
        memory = make_memory(notifier, mappings, timeout, caches[1])
        address_space: AddressSpace = memory
        if self._chaos is not None:
            address_space = ChaoticAddressSpace(address_space, self._chaos)
        regions = RegionManager(
            mappings=mappings,
            notifier=notifier,
            region_limit=lambda: settings.now.limits.regions_per_partition,
            quota=tenant.regions,
            mmio_granularity=request.mmio_granularity,
            event_bus=event_bus,
            journal=journal,
        )
        known: Known = KnownVmas(caches[0])
        patience = timeout
        if isinstance(memory, ImageAddressSpace):  # no thread would be answered before its page is in
            known, patience = memory.known, math.inf
        return Partition(
            partition_id=partition_id,
            name=name,
            owner=owner,
            tenant=tenant,
            request=request,
            address_space=address_space,
            memory=memory,
            hypervisor=hypervisor,
            table=table,
            link=link,
            notifier=notifier,
            regions=regions,
            faults=FaultHandler(regions, address_space, patience, known),
            event_bus=event_bus,
            keeping=keeping,
            caches=caches,
            port_calls=port_calls,
            end_timeout=lambda: settings.now.timeouts.drain_ms / 1000,
        )

    def _memory(
        self,
        request: CreatePartition,
        notifier: MmuNotifier,
        mappings: GuestMappings,
        timeout: float,
        cache: CacheShare,
        *,
        vmm: Connection,
        partition_id: int,
        kept: Keeping | None,
    ) -> DeclaredAddressSpace | ProcessAddressSpace:
        match request.address_space:
            case AddressSpaceKind.DECLARED:
                return DeclaredAddressSpace(
                    lambda: self._settings.now.limits.vmas_per_partition, vmm.tenant.vmas
                )
            case AddressSpaceKind.PROCESS:
                return ProcessAddressSpace(
                    notifier,
                    mappings.some,
                    timeout,
                    vmm.peer_pidfd(),
                    str(partition_id),
                    closer=vmm.tenant.closer,
                    turn=partial(self._turns.turn, vmm.peer.uid),
                    kept=kept,
                    cache=cache,
                )
            case AddressSpaceKind.IMAGE:
                raise ValueError("only `restore` makes one with an image")

    def _hypervisor(
        self, request: CreatePartition, journal: Journal | None
    ) -> SoftwareHypervisor | RemoteHypervisor:
        match request.hypervisor:
            case HypervisorKind.SOFTWARE:
                return self._software(request, journal)
            case HypervisorKind.VMM:
                return RemoteHypervisor(lambda: self._settings.now.timeouts.hypervisor_ms / 1000, journal)
            case HypervisorKind.USERFAULTFD:
                raise ValueError("only `restore` makes one with a userfaultfd")

    def _software(self, request: CreatePartition, journal: Journal | None) -> SoftwareHypervisor:
        pool_limit = self._settings.now.limits.deposit_pages_per_partition
        pool_pages = DEPOSIT_PAGES if request.deposit_pages is None else request.deposit_pages
        if pool_pages > pool_limit:
            raise WireError(
                errno.ENOSPC,
                f"a partition may have {pool_limit} deposited pages, not {pool_pages}",
                limit="deposit_pages_per_partition",
            )
        return SoftwareHypervisor(
            remap=request.remap,
            pool_pages=pool_pages,
            pool_limit=lambda: self._settings.now.limits.deposit_pages_per_partition,
            journal=journal,
        )
