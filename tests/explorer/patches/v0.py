"""The patch as posted on 19 January 2026: mshv_chk_get_mmio_start_pfn and mshv_handle_unmapped_gpa.

Owns its steps in their order. Letters and H-numbers are those of the design's list of hazards.
"""

from __future__ import annotations

from explorer.rules import Rule
from explorer.script import Touch

from .kernel import DriverRegion, Mm
from .root_driver import RootDriver, pfn_behind


class PatchV0(RootDriver):
    async def handle_intercept(self, touch: Touch, current: Mm) -> bool:
        """mshv_handle_unmapped_gpa."""
        if not touch.translated:
            return False  # g: `if (!accinfo.gva_gpa_valid)`, which is about the gva
        gfn = touch.gfn
        region = await self.regions.find_without_the_lock(gfn, self.stage)  # H6: "a fast check"
        if region is None:
            return False
        pfn = await self._mmio_pfn(gfn, current)
        if pfn is None:
            return False  # o: a signal, no memory and no VMA are all "not ours"
        # c: the region that was found first, without the lock; the pfn may be another's
        await self.stage.step(f"goes on with the {region.bar.name} that it found first")
        self._use(region)
        gfn = region.bar.gfn
        pfn = pfn - (gfn - region.bar.gfn)  # a: the fault's gfn was overwritten in the line before
        # f: one pfn stands for nr_pages, whichever VMAs are behind them
        # e: and it is used although both locks have been dropped
        return await self.map_mmio_pages(gfn, pfn, region.bar.count)

    async def _mmio_pfn(self, gfn: int, current: Mm) -> int | None:
        """mshv_chk_get_mmio_start_pfn."""
        async with self.regions_lock.held(self.stage):
            region = self.regions.find(gfn)
            if region is None:
                return None
            page = region.bar.page_of(gfn)
            async with current.lock.read(self.stage):  # H1: a semaphore under a spinlock
                if current.vma(page) is None:  # j: the region's uaddr, in whichever process this is
                    return None
                return await pfn_behind(current, page)

    def _use(self, region: DriverRegion) -> None:
        if region.freed:
            self.stage.find(
                Rule.FREED, f"{region.bar.name}: start_gfn and nr_pages were read after its last put"
            )
