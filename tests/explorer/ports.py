"""The two ports of a partition, recorded and able to pause.

Owns the exact list of calls and the refusals that are ordered. What the calls do is left to the real
implementations inside.
"""

from __future__ import annotations

import errno
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import trio

from intercept_protocol.addresses import GfnRange, UaddrRange
from intercept_protocol.outcomes import Access
from interceptd.address_space import AddressSpace, Caller
from interceptd.hypervisor import Hypervisor, HypervisorCounters, HypervisorError
from interceptd.pages.mapping import Extent, Frame, Mapping

from .pauses import Pauses, Point


@dataclass(frozen=True)
class Mapped:
    """A map that was asked for; `pfn` is that of the first gfn, None for NO_ACCESS."""

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

    def drain_nowait(self) -> bool:
        return self._inner.drain_nowait()

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
    """`events` are the pieces of port calls in the order in which they were asked for."""

    def __init__(self, inner: Hypervisor, pauses: Pauses) -> None:
        self._inner = inner
        self._pauses = pauses
        self._maps_until_refusal = 0
        self._refused_number = errno.EIO
        self._refuses_unmaps = False
        self._maps_with_access = 0
        self.refused_maps: frozenset[int] = frozenset()
        """Which maps with access fail, counted from 1: none that takes something away."""
        self.failing_calls: Collection[int] = ()
        """Which pieces of all fail, maps and unmaps counted together from 1."""
        self.events: list[Mapped | Unmapped] = []
        self.calls: list[list[Mapped | Unmapped]] = []
        """The same, by the call that asked for them."""
        self.pieces_per_call = 1
        self.may_block = True
        """The reply to the core; the `pauses` may block."""

    def refuse_map(self, nth: int = 1, number: int = errno.EIO) -> None:
        """The n-th map from now on fails, having changed nothing."""
        self._maps_until_refusal = nth
        self._refused_number = number

    def refuse_unmaps(self) -> None:
        self._refuses_unmaps = True

    async def map_gpas(self, mappings: Sequence[Mapping]) -> None:
        assert 0 < len(mappings) <= self.pieces_per_call
        self.calls.append([])
        for done, mapping in enumerate(mappings):
            with trio.CancelScope(shield=True), _done(done):
                await self._map(mapping)

    async def unmap_gpas(self, ranges: Sequence[GfnRange]) -> None:
        assert 0 < len(ranges) <= self.pieces_per_call
        self.calls.append([])
        for done, gfns in enumerate(ranges):
            with trio.CancelScope(shield=True), _done(done):
                await self._unmap(gfns)

    def _asked(self, event: Mapped | Unmapped) -> None:
        self.events.append(event)
        self.calls[-1].append(event)

    async def _map(self, mapping: Mapping) -> None:
        pfn = None if mapping.frame is None else mapping.frame.page
        self._asked(Mapped(mapping.start, mapping.end, pfn, mapping.access))
        await self._pauses.at(Point.MAP, mapping)
        self._maps_until_refusal -= 1
        self._maps_with_access += bool(mapping.access)
        ordered = self._maps_until_refusal == 0 or len(self.events) in self.failing_calls
        if ordered or (mapping.access and self._maps_with_access in self.refused_maps):
            await self._pauses.at(Point.REFUSED, mapping)
            raise HypervisorError(self._refused_number, "refused by order")
        try:
            await self._inner.map_gpas([mapping])
        except HypervisorError:
            await self._pauses.at(Point.REFUSED, mapping)
            raise
        await self._pauses.at(Point.MAPPED, mapping)

    async def _unmap(self, gfns: GfnRange) -> None:
        self._asked(Unmapped(gfns.start, gfns.end))
        await self._pauses.at(Point.UNMAP, gfns)
        if self._refuses_unmaps or len(self.events) in self.failing_calls:
            raise HypervisorError(errno.EIO, "refused by order")
        await self._inner.unmap_gpas([gfns])
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


@contextmanager
def _done(pieces: int) -> Iterator[None]:
    """A refusal comes after so many pieces of the call were done."""
    try:
        yield
    except HypervisorError as error:
        error.done = pieces
        raise
