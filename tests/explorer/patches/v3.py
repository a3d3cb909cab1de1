"""The patch as posted on 30 April (V2) and 11 May 2026 (V3): the same code in both.

Owns its steps in their order. The lookup is done under the lock and takes a reference, only mmap_lock is held
while the page is faulted in, and the base is computed before the fault's gfn is overwritten. What it still
lacks is a notifier (H3, H4, e, k), and all that the comments name.
"""

from __future__ import annotations

from explorer.script import Touch

from .kernel import Mm
from .root_driver import RootDriver, pfn_behind


class PatchV3(RootDriver):
    async def handle_intercept(self, touch: Touch, current: Mm) -> bool:
        """mshv_handle_unmapped_gpa; gva_gpa_valid is not asked for any more."""
        async with self.regions_lock.held(self.stage):
            region = self.regions.find(touch.gfn)
            if region is None:
                return False
            region.references += 1
        try:
            page = region.bar.page_of(touch.gfn)
            async with current.lock.read(self.stage):  # j: in whichever process this is
                pfn = None if current.vma(page) is None else await pfn_behind(current, page)
            if pfn is None:
                return False  # o
            # i: this may be below zero, where the fault's VMA does not begin with the region
            # f: one pfn stands for nr_pages; e: mmap_lock was dropped; s: the region may be unlinked by now
            base = pfn - (touch.gfn - region.bar.gfn)
            return await self.map_mmio_pages(region.bar.gfn, base, region.bar.count)
        finally:
            self.put(region)
