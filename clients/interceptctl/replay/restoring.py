"""A partition made as a state of the recording says, and its regions as the guest reaches them.

Owns the order in which that is possible. Must not know records' kinds, nor answers.
"""

from __future__ import annotations

from typing import Final

from intercept_client import DeclaredVma
from intercept_protocol.addresses import UaddrRange
from intercept_protocol.messages import RegionKind
from intercept_protocol.outcomes import Access
from intercept_protocol.trace import Traced
from interceptctl.page_map import without

from .daemon_side import RepeatedPartition
from .model import Backing, Model, Region, Vma
from .refused import ask
from .verdict import Verdict

_BACKINGS: Final = 36
"""Each backing of live memory gets 2^36 host pages, whose contents nobody looks at."""


class HostPages:
    """The host pages that declared VMAs are said to have; `live` if the recording is of live memory."""

    def __init__(self, *, live: bool) -> None:
        self._live = live
        self._numbers: dict[Backing, int] = {}

    def declared(self, vma: Vma) -> DeclaredVma:
        return DeclaredVma(UaddrRange(start=vma.start, end=vma.end), self._pfn(vma), vma.access, io=vma.io)

    def _pfn(self, vma: Vma) -> int:
        if not self._live:
            return vma.page
        number = self._numbers.setdefault(vma.backing, len(self._numbers) % (1 << 15))
        return (number << _BACKINGS) + vma.page % (1 << _BACKINGS)


class Restored:
    """The partition, and the model that it follows. Raises what the clients raise."""

    def __init__(
        self, partition: RepeatedPartition, model: Model, pages: HostPages, verdict: Verdict
    ) -> None:
        self.partition = partition
        self.model = model
        self.pages = pages
        self.verdict = verdict

    async def make(self) -> None:
        """Declare, add and begin all that the model has."""
        model = self.model
        await self.partition.declare([self.pages.declared(vma) for vma in model.vmas])
        regions = list(model.regions)
        for region in regions:
            if region.dangling and not region.waiting:
                await self._add_dangling(region)
        for region in regions:
            if not (region.dangling or region.waiting):
                await self.add(region)
        for uaddrs in model.open.elements():
            await self.partition.begin(uaddrs)

    async def add(self, region: Region) -> None:
        if region.kind is RegionKind.PINNED:
            await self.partition.add(region)
        else:
            await self.partition.map_exactly(region, self.model.reached(region), present=False)

    async def _add_dangling(self, region: Region) -> None:
        """A pinned region that lost some of its memory: it is added whole, and then loses that."""
        vmm, model = self.partition.vmm, self.model
        start, end = region.uaddrs.start, region.uaddrs.end
        hidden = [vma for vma in model.vmas.clipped(start, end) if Access.READ not in vma.access]
        for vma in hidden:
            await vmm.unmap_vma(UaddrRange(start=vma.start, end=vma.end))
        readable = [(vma.start, vma.end) for vma in model.vmas.clipped(start, end) if vma not in hidden]
        missing = without((start, end), readable)
        await self.partition.declare(
            [DeclaredVma(UaddrRange(start=a, end=b), a, Access.READ | Access.WRITE) for a, b in missing]
        )
        await self.partition.add(region)
        for first, behind in missing:
            await vmm.unmap_vma(UaddrRange(start=first, end=behind))
        await self.partition.declare([self.pages.declared(vma) for vma in hidden])
        for first, behind in without((region.start, region.end), model.reached(region)):
            page = region.uaddr_page(first)
            await self.partition.notifier.invalidate(UaddrRange(start=page, end=page + behind - first))

    async def settle(self, record: Traced, region: Region) -> None:
        """Have the guest reach of the region what it reached in the recording."""
        partition = self.partition
        if region.kind is RegionKind.PINNED:
            return
        wanted = self.model.reached(region)
        if await partition.reached(region.gfns) != wanted:
            request = partition.map_exactly(region, wanted, present=True)
            await ask(self.verdict, record, "change_regions", request)
