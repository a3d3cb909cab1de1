"""Carries out a change of regions on the guest's mappings, and undoes it if the hypervisor refuses.

Owns the order of the calls, and what must be restored after a refusal. Must not know the region list, nor
decide what stays: the region manager exchanges the regions between two of its steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

from intercept_protocol.errors import WireError
from intercept_protocol.messages import RegionKind
from intercept_protocol.text import sentence
from interceptd.errors import PartitionLost
from interceptd.hypervisor import HypervisorError
from interceptd.memory.attempt import Whole, unpopulated
from interceptd.memory.guest_mappings import GuestMappings
from interceptd.memory.long_lists import LongList
from interceptd.memory.region import Piece, Region
from interceptd.memory.region_change import Kept, RegionChange
from interceptd.pages.mapping import Mapping
from interceptd.scheduling.time_share import give_way_shielded


class Refused(Exception):
    """The hypervisor refused what a new region needs; `error` is the answer."""

    def __init__(self, region: Region, error: WireError) -> None:
        super().__init__(str(error))
        self.region = region
        self.error = error


class MappingChange:
    """One change. The lock is held throughout, nothing is broken off, and faults on what changes wait."""

    def __init__(self, mappings: GuestMappings, change: RegionChange) -> None:
        self._mappings = mappings
        self._change = change
        self._pinned: list[tuple[Region, LongList[Mapping]]] = []
        """What was taken away of old pinned regions: it is not left to a fault to map it again."""

    async def take_away(self) -> None:
        """Leave the guest nothing of the old regions but what stays. Raises `PartitionLost`."""
        for region, gfns in self._change.going:
            if region.kind is RegionKind.PINNED:
                self._pinned.append((region, await self._mappings.all(gfns)))
        await self._unmap(self._change.going)
        await self._count(self._change.new, lambda kept: kept.new)

    async def make(self, wholes: Sequence[Whole]) -> None:
        """Map what the new regions need at once. Raises `Refused`."""
        movable = _of_kind(RegionKind.MOVABLE, self._change.coming)
        try:
            await self._mappings.map_no_access(movable)
        except HypervisorError as error:
            self._no_access: list[Piece] = movable[: error.done]  # what `unmake` takes away
            region, _ = movable[error.done]
            raise Refused(region, WireError(error.number, f"region {region.gfns}: {error}")) from error
        self._no_access = movable
        for whole in wholes:
            region = whole.attempt.region
            try:
                await self._mappings.map_gaps(region, whole.attempt.wanted(whole.extents), math.inf)
            except HypervisorError as error:
                why = unpopulated(region, f"the hypervisor refused the map: {error}")
                raise Refused(region, why) from error
            await give_way_shielded()

    async def unmake(self) -> None:
        """Take away what was mapped of the new regions. Raises `PartitionLost`."""
        await self._unmap([*self._no_access, *_of_kind(RegionKind.PINNED, self._change.coming)])
        await self._count(self._change.old, lambda kept: kept.old)

    async def put_back(self) -> None:
        """Map what the old regions had and cannot be without. Raises `PartitionLost`."""
        try:
            await self._mappings.map_no_access(_of_kind(RegionKind.MOVABLE, self._change.going))
            for region, mappings in self._pinned:
                await self._mappings.map_again(region, mappings)
        except HypervisorError as error:
            raise PartitionLost(f"a refused change of regions cannot be undone: {sentence(error)}") from error

    async def free(self) -> None:
        """Forget what was taken away."""
        for _, mappings in self._pinned:
            await mappings.free()

    async def _count(self, regions: Iterable[Region], side: Callable[[Kept], Region]) -> None:
        """Let the old or the new regions count what is mapped of them, which is what stays."""
        for region in regions:
            region.mapped_gfns = 0
        for kept in self._change.kept:
            side(kept).mapped_gfns += await self._mappings.count(kept.gfns)

    async def _unmap(self, pieces: Iterable[Piece]) -> None:
        going = self._mappings.revocation()
        for region, gfns in pieces:
            await going.unmap_all(region, gfns)
            await give_way_shielded()
        await going.finish()


def _of_kind(kind: RegionKind, pieces: Iterable[Piece]) -> list[Piece]:
    return [(region, gfns) for region, gfns in pieces if region.kind is kind]
