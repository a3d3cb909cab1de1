"""The repeated partition: declared memory and the software hypervisor, on one daemon.

Owns the connections, and how exactly so many gfns of a region come to be mapped. Must not know recordings.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Final

from intercept_client import DeclaredVma, NewRegion, TrioNotifier, TrioVmm, TrioVp
from intercept_protocol import messages
from intercept_protocol.addresses import GfnRange, UaddrRange
from intercept_protocol.messages import (
    AddressSpaceKind,
    Architecture,
    HypervisorKind,
    MmioGranularity,
    PartitionCredentials,
    RegionKind,
)
from intercept_protocol.outcomes import Access
from interceptctl.page_map import Span, joined

from .model import Region

TIMEOUT_MS: Final = 20
"""For intercepts in a range that is being invalidated, which wait in vain: nothing else happens meanwhile."""
PIECES: Final = 64
"""Regions in one request."""
VMAS: Final = 128


class RepeatedPartition:
    """Its calls raise what the clients raise."""

    def __init__(
        self,
        path: str,
        vmm: TrioVmm,
        notifier: TrioNotifier,
        credentials: PartitionCredentials,
        stack: AsyncExitStack,
    ) -> None:
        """Use `opened`."""
        self.vmm = vmm
        self.notifier = notifier
        self._path = path
        self._credentials = credentials
        self._stack = stack
        self._vps: dict[int, TrioVp] = {}

    @classmethod
    @asynccontextmanager
    async def opened(
        cls, path: str, architecture: Architecture, mmio_granularity: MmioGranularity
    ) -> AsyncIterator[RepeatedPartition]:
        async with AsyncExitStack() as stack:
            vmm = await stack.enter_async_context(TrioVmm.open(path, name="replay"))
            credentials = await vmm.create_partition(
                AddressSpaceKind.DECLARED,
                HypervisorKind.SOFTWARE,
                architecture=architecture,
                mmio_granularity=mmio_granularity,
                invalidate_timeout_ms=TIMEOUT_MS,
            )
            notifier = await stack.enter_async_context(TrioNotifier.open(path, credentials))
            yield cls(path, vmm, notifier, credentials, stack)

    async def vp(self, vp_index: int) -> TrioVp:
        """Attached when it is first needed."""
        if vp_index not in self._vps:
            client = TrioVp.open(self._path, self._credentials, vp_index=vp_index)
            self._vps[vp_index] = await self._stack.enter_async_context(client)
        return self._vps[vp_index]

    async def declare(self, vmas: Sequence[DeclaredVma]) -> None:
        for first in range(0, len(vmas), VMAS):
            await self.vmm.map_vmas(vmas[first : first + VMAS])

    async def begin(self, uaddrs: UaddrRange) -> None:
        await self.notifier.call(
            messages.InvalidateBegin(start_uaddr=uaddrs.start_uaddr, length=uaddrs.length)
        )

    async def end(self, uaddrs: UaddrRange) -> None:
        await self.notifier.call(messages.InvalidateEnd(start_uaddr=uaddrs.start_uaddr, length=uaddrs.length))

    async def add(self, region: Region) -> None:
        await self.vmm.add_regions([part_of(region, region.gfns)])

    async def remove(self, region: Region) -> None:
        await self.vmm.remove_region(region.gfns, region.uaddrs)

    async def reached(self, gfns: GfnRange) -> list[Span]:
        """What the guest reaches there."""
        found: list[Span] = []
        after, more = gfns.start - 1 if gfns.start else None, True
        before = await self.vmm.translate(gfns.start)  # a mapping that starts before `gfns` is not listed
        if before is not None:
            found.append((gfns.start, gfns.start + 1))
        while more:
            page = await self.vmm.call(messages.ListMappings(after=after))
            for mapping in page.mappings:
                start, end = mapping.start_gfn, min(mapping.start_gfn + mapping.page_count, gfns.end)
                if start >= gfns.end:
                    return joined(iter(found))
                if mapping.access:
                    found = found if start > gfns.start else []
                    found.append((start, end))
                after = start
            more = page.more and bool(page.mappings)
        return joined(iter(found))

    async def map_exactly(self, region: Region, wanted: Sequence[Span], *, present: bool) -> None:
        """Have the guest reach just these gfns of a region that is not pinned; `present` if it was added.

        A fault maps more than its page, so each piece first becomes a region of its own; when those become
        one again, what is mapped stays.
        """
        old, rest = ([region.gfns] if present else []), list(wanted)
        while rest:
            pieces = [GfnRange(start=start, end=end) for start, end in rest[:PIECES]]
            del rest[:PIECES]
            if old and old[0] is region.gfns:
                await self._exchange(region, old, pieces)
                old = pieces
            else:
                await self._exchange(region, [], pieces)
                old += pieces
            for gfns in pieces:
                await self.vmm.prefault(gfns)
            whole = GfnRange(start=old[0].start, end=old[-1].end)
            if len(old) > 1:
                await self._exchange(region, old, [whole])
            old = [whole]
        if not wanted and present:
            await self._exchange(region, old, [])
            old = []
        if old != [region.gfns]:
            await self._exchange(region, old, [region.gfns])

    async def _exchange(self, region: Region, old: Sequence[GfnRange], new: Sequence[GfnRange]) -> None:
        await self.vmm.change_regions(
            remove=[(gfns, uaddrs_of(region, gfns)) for gfns in old],
            add=[part_of(region, gfns) for gfns in new],
        )


def uaddrs_of(region: Region, gfns: GfnRange) -> UaddrRange:
    start = region.uaddr_page(gfns.start)
    return UaddrRange(start=start, end=start + gfns.page_count)


def part_of(region: Region, gfns: GfnRange) -> NewRegion:
    """Kinds are stated: what `auto` made of one is known."""
    return NewRegion(
        gfns=gfns,
        uaddrs=uaddrs_of(region, gfns),
        kind=RegionKind(region.kind),
        writable=bool(region.access & Access.WRITE),
        executable=bool(region.access & Access.EXECUTE),
    )
