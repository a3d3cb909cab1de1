"""The curves of the core alone, by CPU time in one process: what a busy machine does beside does not count.

Owns a partition's parts without sockets or connections: the real region manager, intercept path, declared
memory and software hypervisor. Part of `make bench-scale`.
"""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Awaitable, Callable
from functools import partial
from statistics import median

import trio

from intercept_protocol.addresses import GfnRange, UaddrRange
from intercept_protocol.messages import MmioGranularity, RegionKind, Remap
from intercept_protocol.outcomes import Access
from interceptd.address_space.declared import DeclaredAddressSpace, Vma
from interceptd.hypervisor.software import SoftwareHypervisor
from interceptd.memory.attempt import Busy
from interceptd.memory.fault_handler import Fault, FaultHandler
from interceptd.memory.guest_mappings import GuestMappings
from interceptd.memory.region import KindOrigin, Region
from interceptd.memory.region_manager import RegionManager
from interceptd.memory_budget import Cost, MemoryShare, unlimited
from interceptd.mmu_notifier import MmuNotifier
from interceptd.quota import Quota
from interceptd.telemetry.event_bus import EventBus, PartitionPublisher

LIMIT = 1 << 20
RW = Access.READ | Access.WRITE
ASKED = 3000
"""Pages that each figure is the mean of; the median of `ROUNDS` such means."""
ROUNDS = 5
MAPPED_MOST = 100_000
"""Regions that are touched, the first ones: the extents that the later figures are among."""
Step = Callable[[int], Awaitable[object]]


def quota(noun: str) -> Quota:
    """One that nothing here reaches."""
    memory = MemoryShare(0, unlimited())
    return Quota(0, noun, "of a uid", lambda: LIMIT, memory=memory, cost=Cost.MAPPING)


class Core:
    """`count` regions of a page each, with a gap between any two, over one VMA."""

    def __init__(self, count: int) -> None:
        self.count = count
        event_bus = PartitionPublisher(EventBus(), 1)
        self.notifier = MmuNotifier(open_limit=lambda: 1, event_bus=event_bus)
        self.hypervisor = SoftwareHypervisor(remap=Remap.REPLACE, pool_pages=256, pool_limit=lambda: LIMIT)
        self.regions = RegionManager(
            mappings=GuestMappings(self.hypervisor, lambda: LIMIT, quota("mappings")),
            notifier=self.notifier,
            region_limit=lambda: LIMIT,
            quota=quota("regions"),
            mmio_granularity=MmioGranularity.VMA,
            event_bus=event_bus,
        )
        memory = DeclaredAddressSpace(lambda: LIMIT, quota("VMAs"))
        memory.map_vma(Vma(0, 2 * count, 0, RW, io=True))
        self.faults = FaultHandler(self.regions, memory, timeout=60)
        self._draw = random.Random(7)

    async def fill(self) -> float:
        """Microseconds to add a region, the mean of all."""
        began = time.thread_time()
        for page in range(0, 2 * self.count, 2):
            await self.regions.add(
                Region(
                    GfnRange(start=page, end=page + 1),
                    UaddrRange(start=page, end=page + 1),
                    RegionKind.MMIO,
                    KindOrigin.STATED,
                    RW,
                )
            )
        return (time.thread_time() - began) * 1e6 / self.count

    async def lookup(self, page: int) -> None:
        self.faults.lookup(page, Access.READ)

    async def touch(self, page: int) -> None:
        found = self.faults.lookup(page, Access.READ)
        if isinstance(found, Busy | Region):
            fault = Fault(page, Access.READ, found)
            if await self.faults.handle_nowait(fault) is None:
                await self.faults.handle(fault, lambda _: None)

    async def invalidate(self, page: int) -> None:
        self.notifier.invalidate(UaddrRange(start=page, end=page + 1))
        await self.regions.serve_pending()

    async def cost(self, step: Step, before: Step | None = None) -> float:
        """Microseconds for a step on a page drawn at random, with `before` done to it off the clock."""
        means = []
        for _ in range(ROUNDS):
            pages = [2 * self._draw.randrange(self.count) for _ in range(ASKED)]
            spent = 0.0
            for page in pages:
                if before is not None:
                    await before(page)
                began = time.thread_time()
                await step(page)
                spent += time.thread_time() - began
            means.append(spent * 1e6 / ASKED)
        return median(means)


async def _measure(count: int) -> dict[str, float]:
    core = Core(count)
    gc.collect()
    found = {"add a region": await core.fill(), "look-up, nothing mapped": await core.cost(core.lookup)}
    core.count = min(count, MAPPED_MOST)
    for page in range(0, 2 * core.count, 2):
        await core.touch(page)
    found["look-up, mapped"] = await core.cost(core.lookup)
    found["first touch"] = await core.cost(core.touch, before=core.invalidate)
    found["invalidate a page"] = await core.cost(core.invalidate, before=core.touch)
    return found


def measure(count: int) -> dict[str, float]:
    """CPU microseconds by what was done, among `count` regions, of which up to `MAPPED_MOST` are mapped."""
    return trio.run(partial(_measure, count))


async def _gib() -> tuple[float, int]:
    core = Core(1)
    pages = 1 << 18
    memory = DeclaredAddressSpace(lambda: LIMIT, quota("VMAs"))
    memory.map_vma(Vma(0, pages, 0, RW, io=True))
    core.faults = FaultHandler(core.regions, memory, timeout=60)
    whole = GfnRange(start=0, end=pages), UaddrRange(start=0, end=pages)
    await core.regions.add(Region(*whole, RegionKind.MMIO, KindOrigin.STATED, RW))
    began = time.thread_time()
    await core.touch(0)
    return (time.thread_time() - began) * 1e6, core.hypervisor.counters().map_calls


def first_touch_of_a_gib() -> tuple[float, int]:
    """CPU microseconds, and map hypercalls, for the one intercept that maps a GiB."""
    return trio.run(_gib)
