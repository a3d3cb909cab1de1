"""What a kernel gives a driver: locks that may and may not sleep, a list, a process's memory.

Owns those primitives, in steps that other CPUs can come between. Must not know what the driver does.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import trio

from explorer.rules import Rule
from explorer.script import Bar, Pages
from explorer.system_under_test import Stage
from intercept_protocol.addresses import UaddrRange
from intercept_protocol.outcomes import Access
from interceptd.address_space.declared import DeclaredAddressSpace, Vma
from interceptd.quota import Quota


class SpinLock:
    """Its holder must not sleep. Waiters spin, so others run."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._lock = trio.Lock()

    @asynccontextmanager
    async def held(self, stage: Stage) -> AsyncIterator[None]:
        async with self._lock:
            stage.tell(f"takes the spinlock {self.name}")
            yield
            stage.tell(f"releases {self.name}")

    @property
    def is_mine(self) -> bool:
        return self._lock.locked() and self._lock.statistics().owner is trio.lowlevel.current_task()


class RwSemaphore:
    """mmap_lock: many readers or one writer; who takes it may sleep."""

    def __init__(self) -> None:
        self._readers = 0
        self._writing = trio.Lock()
        self._no_reader = trio.Event()
        self._no_reader.set()

    @asynccontextmanager
    async def read(self, stage: Stage) -> AsyncIterator[None]:
        await stage.sleep("mmap_read_lock, which may sleep")
        async with self._writing:
            self._readers += 1
            self._no_reader = self._no_reader if self._readers > 1 else trio.Event()
        try:
            yield
        finally:
            self._readers -= 1
            if not self._readers:
                self._no_reader.set()

    @asynccontextmanager
    async def write(self) -> AsyncIterator[None]:
        async with self._writing:
            await self._no_reader.wait()
            yield


@dataclass(eq=False)
class DriverRegion:
    """struct mshv_mem_region, as far as an MMIO region has one; `following` is its hnode."""

    bar: Bar
    references: int = 1
    freed: bool = False
    following: DriverRegion | None = None
    poisoned: bool = False
    """What hlist_del leaves in a node's own pointers: who follows them faults (LIST_POISON1)."""


@dataclass(eq=False)
class RegionHlist:
    """pt_mem_regions: newest first, unordered, edited in steps that a reader without the lock can see."""

    first: DriverRegion | None = None

    def add_head(self, region: DriverRegion) -> None:
        """hlist_add_head: the node's own pointer first, the head's last, so that readers see either list."""
        region.following, self.first = self.first, region

    async def delete(self, region: DriverRegion, stage: Stage) -> None:
        """hlist_del: taken out of the chain, then poisoned."""
        if self.first is region:
            self.first = region.following
        else:
            previous = next(each for each in self if each.following is region)
            previous.following = region.following
        await stage.step(f"takes {region.bar.name} out of the list")
        region.poisoned = True

    def __iter__(self) -> _Nodes:
        return _Nodes(self.first)

    def find(self, gfn: int) -> DriverRegion | None:
        """mshv_partition_region_by_gfn, by a caller who holds the lock."""
        return next((region for region in self if region.bar.covers(gfn)), None)

    async def find_without_the_lock(self, gfn: int, stage: Stage) -> DriverRegion | None:
        """The same, by a caller who does not: others may edit what it walks."""
        region = self.first
        while region is not None:
            await stage.step(f"walks the list without its lock, at {region.bar.name}")
            if region.poisoned or region.freed:
                stage.find(Rule.TORN, f"{region.bar.name} was taken out of the list under the walker's feet")
                return None
            if region.bar.covers(gfn):
                return region
            region = region.following
        return None


class _Nodes:
    def __init__(self, first: DriverRegion | None) -> None:
        self._next = first

    def __iter__(self) -> _Nodes:
        return self

    def __next__(self) -> DriverRegion:
        region = self._next
        if region is None:
            raise StopIteration
        self._next = region.following
        return region


class Mm:
    """A process's memory: its VMAs, which of their pages are present, and mmap_lock."""

    def __init__(self, stage: Stage) -> None:
        self.lock = RwSemaphore()
        self._stage = stage
        self._vmas = DeclaredAddressSpace(lambda: 1 << 20, Quota(0, "VMAs", "vmas_per_uid", lambda: 1 << 20))
        self._present: set[int] = set()
        self._disabled: list[Pages] = []

    def mmap(self, pages: Pages, pfn: int, access: Access) -> None:
        self._vmas.map_vma(Vma(pages.start, pages.end, pfn, access, io=True))

    async def munmap(self, pages: Pages) -> None:
        async with self.lock.write():
            await self._vmas.unmap_vma(UaddrRange(start=pages.start, end=pages.end))
            self._present -= set(range(pages.start, pages.end))

    async def mprotect(self, pages: Pages, access: Access) -> None:
        async with self.lock.write():
            await self._vmas.protect_vma(UaddrRange(start=pages.start, end=pages.end), access)
            self._present -= set(range(pages.start, pages.end))

    def zap(self, pages: Pages) -> None:
        """The VMA stays, its pages go: what VFIO does to its own mapping around a reset."""
        self._present -= set(range(pages.start, pages.end, pages.step))

    def disable(self, pages: Pages) -> None:
        """Zapped, and faults are SIGBUS until it is enabled again."""
        self.zap(pages)
        self._disabled.append(pages)

    def enable(self, pages: Pages) -> None:
        self._disabled.remove(pages)

    def vma(self, page: int) -> Vma | None:
        """vma_lookup; the caller holds mmap_lock."""
        return self._vmas.vma_at(page)

    def follow(self, page: int) -> int | None:
        """follow_pfnmap_start: the pfn of a page that is present."""
        vma = self.vma(page)
        if vma is None or page not in self._present:
            return None
        return vma.start_pfn + page - vma.start

    async def fixup_user_fault(self, page: int, access: Access) -> bool:
        """Make the page present for this access; False is -EFAULT. May sleep."""
        await self._stage.sleep("fixup_user_fault, which may sleep")
        vma = self.vma(page)
        if vma is None or access not in vma.access or any(page in pages for pages in self._disabled):
            return False
        self._present.add(page)
        return True
