"""Extra checkpoints around every port call, so that races can be reached from outside.

Owns two wrappers that behave like what they wrap, only later. Off unless INTERCEPTD_CHAOS is set; `hello`
says so.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import trio

from intercept_protocol.addresses import GfnRange, UaddrRange
from interceptd.address_space import AddressSpace, Caller
from interceptd.hypervisor import Hypervisor, HypervisorCounters
from interceptd.pages.mapping import Extent, Mapping


class Chaos:
    """Draws up to `most` checkpoints at a time."""

    def __init__(self, most: int, rng: random.Random) -> None:
        self._most = most
        self._rng = rng

    async def pause(self) -> None:
        for _ in range(self._rng.randint(0, self._most)):
            await trio.lowlevel.checkpoint()


class ChaoticAddressSpace:
    may_block = True

    def __init__(self, inner: AddressSpace, chaos: Chaos) -> None:
        self._inner = inner
        self._chaos = chaos

    @property
    def vma_count(self) -> int:
        return self._inner.vma_count

    def drain_nowait(self) -> bool:
        return self._inner.drain_nowait()

    async def resolve(
        self, page: int, window: UaddrRange, region: UaddrRange, caller: Caller = Caller.GUEST
    ) -> Extent | None:
        await self._chaos.pause()
        extent = await self._inner.resolve(page, window, region, caller)
        await self._chaos.pause()
        return extent

    async def is_io(self, page: int, caller: Caller = Caller.GUEST) -> bool | None:
        await self._chaos.pause()
        io = await self._inner.is_io(page, caller)
        await self._chaos.pause()
        return io


class ChaoticHypervisor:
    may_block = True

    def __init__(self, inner: Hypervisor, chaos: Chaos) -> None:
        self._inner = inner
        self._chaos = chaos

    @property
    def pieces_per_call(self) -> int:
        return self._inner.pieces_per_call

    async def map_gpas(self, mappings: Sequence[Mapping]) -> None:
        with trio.CancelScope(shield=True):
            await self._chaos.pause()
            await self._inner.map_gpas(mappings)
            await self._chaos.pause()

    async def unmap_gpas(self, ranges: Sequence[GfnRange]) -> None:
        with trio.CancelScope(shield=True):
            await self._chaos.pause()
            await self._inner.unmap_gpas(ranges)
            await self._chaos.pause()

    def translate(self, gfn: int) -> Mapping | None:
        return self._inner.translate(gfn)

    async def discard(self) -> None:
        await self._inner.discard()

    def counters(self) -> HypervisorCounters:
        return self._inner.counters()
