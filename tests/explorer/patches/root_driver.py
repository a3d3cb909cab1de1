"""The mshv root driver that the patch is applied to, as far as MMIO goes.

Owns its ioctls, its region list with the spinlock, its hypercalls with their roll-back, and the order of its
end. Each deviation from what a reviewer would want is the driver's own; the sentences beside them say which.
Must not know how an intercept is handled: that is the patch's.
"""

from __future__ import annotations

import errno
from collections.abc import Awaitable, Callable, Iterable, Sequence

from explorer.failing_hypervisor import FailingHypervisor
from explorer.judge import EVERYWHERE
from explorer.ports import RecordedHypervisor
from explorer.script import RW, Bar, MapVma, Pages, ProtectVma, Script, Touch
from explorer.system_under_test import Stage, Subject
from intercept_protocol.addresses import GfnRange
from intercept_protocol.errors import WireError
from intercept_protocol.messages import Remap
from intercept_protocol.outcomes import Access, Answer
from interceptd.hypervisor import HypervisorError
from interceptd.pages.mapping import HOST_BACKING, Cache, Frame, Mapping

from .kernel import DriverRegion, Mm, RegionHlist, SpinLock

U64 = 1 << 64


class DriverHypercalls(FailingHypervisor):
    """hv_do_map_gpa_hcall: after a failure it unmaps every page that it completed, even one mapped before."""

    def _roll_back(self, done: GfnRange, before: list[Mapping]) -> None:  # noqa: ARG002 - nothing is put back
        super()._roll_back(done, [])


class RootDriver(Subject):
    """A patch is a subclass that says what becomes of an intercept."""

    says_why = False  # the handler answers with a bool

    def __init__(self, play: Script, stage: Stage) -> None:
        self.slat = DriverHypercalls(
            remap=Remap.REPLACE,  # "Hypervisor does not return an error", and the last pfn wins
            pool_pages=256,
            pool_limit=lambda: 1 << 20,
            failing_calls=play.failing,
        )
        self.hypervisor = RecordedHypervisor(self.slat, stage)
        self.hypervisor.refused_maps = play.refused
        self.stage = stage
        self.mm = Mm(stage)
        self.regions = RegionHlist()
        self.regions_lock = SpinLock("pt_mem_regions_lock")
        self._lent: dict[int, Mm] = {}
        self._judges: dict[int, Callable[[Touch, Answer], None]] = {}

    async def handle_intercept(self, touch: Touch, current: Mm) -> bool:
        """mshv_vp_handle_intercept: whether it was handled, and the VP is to be run again. `current` is
        current->mm, of the caller of MSHV_RUN_VP."""
        raise NotImplementedError

    # ------------------------------------------------ what a VP does

    def attach(self, vp: int, judge: Callable[[Touch, Answer], None]) -> None:
        self._judges[vp] = judge

    async def intercept(self, vp: int, touch: Touch) -> Answer:
        """MSHV_RUN_VP runs the VP again while its intercepts are handled; else user space emulates."""
        current = self._lent.get(vp, self.mm)
        answer = Answer.MAPPED if await self.handle_intercept(touch, current) else Answer.UNBACKED
        self._judges[vp](touch, answer)
        return answer

    # ------------------------------------------------ what a VMM does

    async def live(self, vmm: Callable[[], Awaitable[None]]) -> None:
        await vmm()
        await self.slat.unmap_gpas([EVERYWHERE])  # HVCALL_FINALIZE_PARTITION takes everything along

    async def map_vma(self, verb: MapVma) -> None:
        self.mm.mmap(verb.pages, verb.pfn, verb.access)

    def lend_vp(self, vp: int, memory: MapVma) -> None:
        """The owner of the descriptor is not checked: there is no kvm->mm here."""
        self._lent[vp] = Mm(self.stage)
        self._lent[vp].mmap(memory.pages, memory.pfn, memory.access)

    async def unmap_vma(self, pages: Pages) -> None:
        """munmap. MMIO regions have no mmu_interval_notifier: the driver is not told."""
        await self.mm.munmap(pages)

    async def protect_vma(self, verb: ProtectVma) -> None:
        await self.mm.mprotect(verb.pages, verb.access)

    async def add_region(self, bar: Bar) -> None:
        """MSHV_SET_GUEST_MEMORY: EINVAL where no VMA is at the region's start, the rest of it is not looked
        at; EEXIST on an overlap of gfns. Nothing is mapped before the first intercept."""
        if self.mm.vma(bar.page) is None:
            raise WireError(errno.EINVAL, "no VMA")
        async with self.regions_lock.held(self.stage):
            for region in self.regions:
                if region.bar.gfn < bar.gfn + bar.count and bar.gfn < region.bar.gfn + region.bar.count:
                    raise WireError(errno.EEXIST, "overlap")
            self.regions.add_head(DriverRegion(bar))

    async def remove_region(self, bar: Bar) -> None:
        """MSHV_SET_GUEST_MEMORY with UNMAP: out of the list under the lock, then the reference is put."""
        async with self.regions_lock.held(self.stage):
            region = self.regions.find(bar.gfn)
            if region is None:
                raise WireError(errno.ENOENT, "no region")
            await self.regions.delete(region, self.stage)
        self.put(region)

    async def change_regions(self, remove: Sequence[Bar], add: Sequence[Bar]) -> None:  # noqa: ARG002
        raise AssertionError("the driver has no such ioctl")

    async def begin(self, pages: Pages) -> None:
        """VFIO disables the memory: mmu_notifier_invalidate_range_start, without subscriber for MMIO."""
        self.mm.disable(pages)

    def end(self, pages: Pages) -> None:
        self.mm.enable(pages)

    async def invalidate(self, pages: Pages) -> None:
        self.mm.zap(pages)

    def kick(self, vp: int) -> None:
        """A signal: a running handler is not interrupted, and does not wait."""

    # ------------------------------------------------ for the patches

    def put(self, region: DriverRegion) -> None:
        """mshv_region_put. The last one frees; process_range skips pages that are NULL, and those of an MMIO
        region all are, so nothing is unmapped."""
        region.references -= 1
        region.freed = not region.references

    async def map_mmio_pages(self, gfn: int, pfn: int, count: int) -> bool:
        """hv_call_map_mmio_pages: always readable, writable and not cached (0x200003), whatever the region's
        flags are; the pfn is not checked but for RAM."""
        wanted = Mapping(gfn, gfn + count, Frame(HOST_BACKING, pfn % U64), 0, RW, Cache.NOT_CACHED)
        try:
            await self.hypervisor.map_gpas([wanted])
        except HypervisorError:
            return False
        return True

    def sleeps_with_a_lock(self) -> str | None:
        return f"the spinlock {self.regions_lock.name}" if self.regions_lock.is_mine else None

    def misrecorded(self, gfns: Iterable[int]) -> str | None:  # noqa: ARG002
        """The driver keeps no record of what is mapped for MMIO."""
        return None

    def disorder(self) -> str | None:
        """The list is not kept in any order."""
        return None

    def remains(self) -> str | None:
        return None


async def pfn_behind(mm: Mm, page: int) -> int | None:
    """What both postings do under mmap_lock: follow_pfnmap_start, and where the page is not there
    fixup_user_fault with FAULT_FLAG_WRITE, for any access, and once more. The pfn is used after
    follow_pfnmap_end."""
    pfn = mm.follow(page)
    if pfn is None and await mm.fixup_user_fault(page, Access.WRITE):
        pfn = mm.follow(page)
    return pfn
