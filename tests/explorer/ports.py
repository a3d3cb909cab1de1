"""The two ports of a partition, recorded and able to pause.

Owns the exact list of calls and the refusals that are ordered. What the calls do is left to the real
implementations inside.
"""

from __future__ import annotations

import errno
from dataclasses import dataclass

from intercept_protocol.addresses import GfnRange, UaddrRange
from intercept_protocol.outcomes import Access
from interceptd.address_space import AddressSpace, Caller
from interceptd.hypervisor import Hypervisor, HypervisorCounters, HypervisorError
from interceptd.pages.mapping import Extent, Frame, Mapping

from .pauses import Pauses, Point


@dataclass(frozen=True)
class Mapped:
    """A map_gpa that was asked for; `pfn` is that of the first gfn, None for NO_ACCESS."""

    start: int
    end: int
    pfn: int | None
    access: Access


@dataclass(frozen=True)
class Unmapped:
    start: int
    end: int


class RecordedAddressSpace:
    """`resolved` are the pages that were asked for, `extents` the answers, in order."""

    def __init__(self, inner: AddressSpace, pauses: Pauses) -> None:
        self._inner = inner
        self._pauses = pauses
        self.may_block = inner.may_block
        """The reply to the core, independent of the `pauses`."""
        self.resolved: list[int] = []
        self.extents: list[Extent | None] = []

    @property
    def vma_count(self) -> int:
        return self._inner.vma_count

    async def resolve(
        self, page: int, window: UaddrRange, region: UaddrRange, caller: Caller = Caller.GUEST
    ) -> Extent | None:
        self.resolved.append(page)
        await self._pauses.at(Point.RESOLVE, page)
        extent = await self._inner.resolve(page, window, region, caller)
        self.extents.append(extent)
        await self._pauses.at(Point.RESOLVED, extent)
        return extent

    async def is_io(self, page: int, caller: Caller = Caller.GUEST) -> bool | None:
        return await self._inner.is_io(page, caller)


class RecordedHypervisor:
    """`events` are the port calls in the order in which they were asked for."""

    def __init__(self, inner: Hypervisor, pauses: Pauses) -> None:
        self._inner = inner
        self._pauses = pauses
        self._maps_until_refusal = 0
        self._refused_number = errno.EIO
        self._refuses_unmaps = False
        self._maps_with_access = 0
        self.refused_maps: frozenset[int] = frozenset()
        """Which maps with access fail, counted from 1: none that takes something away."""
        self.failing_call = 0
        """Which call of all fails, maps and unmaps counted together from 1; 0 for none."""
        self.events: list[Mapped | Unmapped] = []
        self.may_block = True
        """The reply to the core; the `pauses` may block."""

    def refuse_map(self, nth: int = 1, number: int = errno.EIO) -> None:
        """The n-th map_gpa from now on fails, having changed nothing."""
        self._maps_until_refusal = nth
        self._refused_number = number

    def refuse_unmaps(self) -> None:
        self._refuses_unmaps = True

    async def map_gpa(self, mapping: Mapping) -> None:
        pfn = None if mapping.frame is None else mapping.frame.page
        self.events.append(Mapped(mapping.start, mapping.end, pfn, mapping.access))
        await self._pauses.at(Point.MAP, mapping)
        self._maps_until_refusal -= 1
        self._maps_with_access += bool(mapping.access)
        ordered = self._maps_until_refusal == 0 or len(self.events) == self.failing_call
        if ordered or (mapping.access and self._maps_with_access in self.refused_maps):
            await self._pauses.at(Point.REFUSED, mapping)
            raise HypervisorError(self._refused_number, "refused by order")
        try:
            await self._inner.map_gpa(mapping)
        except HypervisorError:
            await self._pauses.at(Point.REFUSED, mapping)
            raise
        await self._pauses.at(Point.MAPPED, mapping)

    async def unmap_gpa(self, gfns: GfnRange) -> None:
        self.events.append(Unmapped(gfns.start, gfns.end))
        await self._pauses.at(Point.UNMAP, gfns)
        if self._refuses_unmaps or len(self.events) == self.failing_call:
            raise HypervisorError(errno.EIO, "refused by order")
        await self._inner.unmap_gpa(gfns)
        await self._pauses.at(Point.UNMAPPED, gfns)

    def translate(self, gfn: int) -> Mapping | None:
        return self._inner.translate(gfn)

    async def discard(self) -> None:
        await self._inner.discard()

    def counters(self) -> HypervisorCounters:
        return self._inner.counters()

    def frame(self, gfn: int) -> Frame | None:
        """What the guest reaches at `gfn`."""
        mapping = self._inner.translate(gfn)
        return None if mapping is None else mapping.frame_at(gfn)
