"""A restored guest's side of the daemon without a daemon: the real parts, joined as the daemon joins them.

Owns the wiring. The userfaultfd and the image are given, real ones or fakes. Must not know what is right.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from typing import Final, Self

import trio

from intercept_protocol.addresses import GfnRange, UaddrRange
from intercept_protocol.messages import MmioGranularity, RegionKind
from intercept_protocol.outcomes import Access, Answer
from interceptd.address_space.image import ImageAddressSpace, ImagePart
from interceptd.address_space.image_file import Image
from interceptd.address_space.missing_faults import MissingFaults
from interceptd.address_space.workers import Workers
from interceptd.config.schema import Limits
from interceptd.connections.tenants import Tenants
from interceptd.hypervisor.userfaultfd import UserfaultfdHypervisor
from interceptd.ledger.journal import Journal
from interceptd.memory.fault_handler import FaultHandler
from interceptd.memory.guest_mappings import GuestMappings
from interceptd.memory.prefetch import prefetch
from interceptd.memory.region import KindOrigin, Region
from interceptd.memory.region_manager import RegionManager
from interceptd.mmu_notifier import MmuNotifier
from interceptd.partition.completion import Completion
from interceptd.partition.fault_reader import FaultReader
from interceptd.telemetry.event_bus import EventBus, PartitionPublisher

LIMITS: Final = Limits()
RWX = Access.READ | Access.WRITE | Access.EXECUTE


class RestoredGuest:
    """`parts` are where the VMM has its memory, and what of the image is there."""

    def __init__(
        self,
        uffd: MissingFaults,
        image: Image,
        parts: Sequence[ImagePart],
        *,
        around: int = 64,
        unit: int = 1,
        workers: Workers | None = None,
        journal: Journal | None = None,
        on_failure: Callable[[OSError], None] = lambda _: None,
        notifier: type[MmuNotifier] = MmuNotifier,
        memory: type[ImageAddressSpace] = ImageAddressSpace,
        hypervisor: type[UserfaultfdHypervisor] = UserfaultfdHypervisor,
        reader: type[FaultReader] = FaultReader,
        limits: Limits = LIMITS,
    ) -> None:
        self.tenant = Tenants(lambda: limits).of(0)
        workers = Workers(4, "image", self.tenant.closer) if workers is None else workers
        self.uffd = uffd
        self.event_bus = EventBus()
        publisher = PartitionPublisher(self.event_bus, 1)
        self.notifier = notifier(lambda: 64, publisher, journal)
        self.memory = memory(image, workers, parts, quota=self.tenant.vmas, unit=unit, on_failure=on_failure)
        self.hypervisor = hypervisor(uffd, image, journal, unit=unit)
        self.mappings = GuestMappings(self.hypervisor, lambda: 1 << 20, self.tenant.mappings)
        self.manager = RegionManager(
            mappings=self.mappings,
            notifier=self.notifier,
            region_limit=lambda: 64,
            quota=self.tenant.regions,
            mmio_granularity=MmioGranularity.VMA,
            event_bus=publisher,
            journal=journal,
        )
        self.faults = FaultHandler(self.manager, self.memory, math.inf, self.memory.known)
        self.regions = [
            Region(
                GfnRange(start=part.image_page, end=part.image_page + part.end - part.start),
                UaddrRange(start=part.start, end=part.end),
                RegionKind.MOVABLE,
                KindOrigin.STATED,
                RWX,
                block=max(around, unit),
            )
            for part in parts
        ]
        self.answers: Counter[Answer] = Counter()
        self.reader = reader(
            uffd,
            regions=self.regions,
            faults=self.faults,
            notifier=self.notifier,
            memory=self.memory,
            hypervisor=self.hypervisor,
            answers=self.answers,
            event_bus=publisher,
        )
        self.completion = Completion(self.regions, self.memory, self.hypervisor, publisher)

    async def add_regions(self) -> None:
        for region in self.regions:
            await self.manager.add(region)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[Self]:
        """With the tasks of a partition; cancelled at the end."""
        await self.add_regions()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.manager.run)
            nursery.start_soon(self.reader.run)
            nursery.start_soon(self.completion.watch)
            yield self
            nursery.cancel_scope.cancel()
        self.memory.close()

    async def prefetch(self, runs: Iterable[GfnRange]) -> None:
        await prefetch(runs, self.faults, self.manager, self.reader, self.from_image)

    def from_image(self, gfns: GfnRange) -> list[GfnRange]:
        """The parts of gfns that were not given back."""
        return [
            region.gfns_of(run)
            for region in self.regions
            if (part := region.gfns.clip(gfns)) is not None
            for run in self.memory.image_runs(region.uaddrs_of(part))
        ]
