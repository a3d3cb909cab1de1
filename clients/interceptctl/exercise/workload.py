"""The workload: random actions of the fake VMM, one after the other.

Owns the choice of what is changed and how much of it; must not know the consequences.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from enum import StrEnum
from typing import Final

from intercept_protocol.addresses import UaddrRange
from intercept_protocol.messages import MmioGranularity, RegionKind
from intercept_protocol.outcomes import Access

from .layout import MEMORIES, RAM, SHARED, SLOTS, Memory, Slot
from .notifier import FakeNotifier
from .tally import Tally
from .truth import Truth
from .vmm import FakeVmm
from .world import Region


class Action(StrEnum):
    MAP = "map"
    UNMAP = "unmap"
    UNMAP_ACROSS = "unmap across VMAs"
    REPLACE = "replace"
    REPLACE_SHUT = "replace between begin and end"
    PROTECT = "protect"
    INVALIDATE = "invalidate"
    ADD = "add region"
    REMOVE = "remove region"
    MOVE = "move region"
    POLICY = "set policy"
    KICK = "kick"


WEIGHTS: Final[Mapping[Action, int]] = {
    Action.MAP: 24,
    Action.UNMAP: 14,
    Action.UNMAP_ACROSS: 2,
    Action.REPLACE: 14,
    Action.REPLACE_SHUT: 8,
    Action.PROTECT: 10,
    Action.INVALIDATE: 4,
    Action.ADD: 10,
    Action.REMOVE: 4,
    Action.MOVE: 4,
    Action.POLICY: 2,
    Action.KICK: 4,
}

_RIGHTS: Final = (Access.READ | Access.WRITE, Access.READ, Access.NONE, Access.READ | Access.EXECUTE)
_RIGHTS_WEIGHTS: Final = (50, 30, 10, 10)
_MEMORY_WEIGHTS: Final = tuple(2 if memory is SHARED else 20 for memory in MEMORIES)
"""A VMM promises to keep the memory of a pinned region; breaking the promise is exercised, but rarely."""


class Workload:
    def __init__(
        self, vmm: FakeVmm, notifier: FakeNotifier, truth: Truth, tally: Tally, rng: random.Random
    ) -> None:
        self._vmm = vmm
        self._notifier = notifier
        self._truth = truth
        self._tally = tally
        self._rng = rng

    async def set_up(self) -> None:
        """Map all memory, and add every slot's region at its first home."""
        for memory in MEMORIES:
            for part in memory.parts:
                await self._vmm.map(part, memory.access, io=memory.io)
        for slot in SLOTS:
            await self._vmm.add(slot, slot.homes[0])

    async def wait_idle(self) -> None:
        """Add the missing regions again, where the memory allows it."""
        for slot in SLOTS:
            if self._region(slot) is None:
                await self._vmm.add(slot, slot.homes[0])

    async def go_on(self) -> None:
        """Perform one random action, which may take several requests or none."""
        action = self._rng.choices(list(WEIGHTS), list(WEIGHTS.values()))[0]
        said = await self._do(action)
        self._tally.events.append(f"{action} {said}")

    async def _do(self, action: Action) -> str:
        rng, vmm = self._rng, self._vmm
        match action:
            case Action.ADD | Action.REMOVE | Action.MOVE:
                return await self._change_region(action, rng.choice(SLOTS))
            case Action.POLICY:
                granularity = rng.choice(list(MmioGranularity))
                await vmm.set_policy(granularity)
                return granularity
            case Action.KICK:
                vp_index = rng.choice([None, rng.randrange(len(self._tally.vps))])
                self._tally.kicked(vp_index)
                await vmm.kick(vp_index)
                return "all" if vp_index is None else f"VP {vp_index}"
            case _:
                return await self._change_memory(action, self._memory())

    async def _change_memory(self, action: Action, memory: Memory) -> str:
        rng, vmm = self._rng, self._vmm
        piece = self._piece(memory)
        match action:
            case Action.MAP:
                await self._map_a_gap(memory)
                return memory.name
            case Action.UNMAP_ACROSS:
                piece = UaddrRange(start=piece.start, end=piece.start + rng.randint(1, 300))
                await vmm.unmap(piece)
            case Action.REPLACE:
                await self._replace(memory, piece)
            case Action.REPLACE_SHUT:
                wider = UaddrRange(start=piece.start - rng.randint(0, 2), end=piece.end + rng.randint(0, 2))
                async with self._notifier.shutting(wider):
                    await self._replace(memory, piece)
            case Action.PROTECT:
                await vmm.protect(piece, rng.choices(_RIGHTS, _RIGHTS_WEIGHTS)[0])
            case Action.INVALIDATE:
                await self._notifier.invalidate(piece)
            case _:
                await vmm.unmap(piece)
        return f"{memory.name} {piece}"

    async def _change_region(self, action: Action, slot: Slot) -> str:
        """Add a missing region, or remove or move an existing one; always replace a dangling one."""
        region = self._region(slot)
        if action is not Action.ADD and region is not None:
            await self._vmm.remove(region)
            region = None
            if action is Action.REMOVE:
                return slot.name
        elif region is not None and region.kind is RegionKind.PINNED and region.hits:
            await self._vmm.remove(region)
            region = None
        if region is None:
            await self._vmm.add(slot, self._rng.choice(slot.homes))
        return slot.name

    async def _replace(self, memory: Memory, piece: UaddrRange) -> None:
        """Map other frames at the same addresses, as MAP_FIXED does; holes between the parts stay."""
        await self._vmm.unmap(piece)
        for part in memory.parts:
            inside = piece.clip(part)
            if inside is not None:
                await self._map(memory, inside)

    async def _map_a_gap(self, memory: Memory) -> None:
        gaps = [gap for part in memory.parts for gap in self._truth.gaps(part)]
        if gaps:
            await self._map(memory, self._rng.choice(gaps))

    async def _map(self, memory: Memory, uaddrs: UaddrRange) -> None:
        """Sometimes with fewer rights, or as the other kind of memory, which affects `auto` regions."""
        access = Access.READ if self._rng.random() < 0.1 else memory.access
        io = memory.io if self._rng.random() < 0.95 else not memory.io
        await self._vmm.map(uaddrs, access, io=io)

    def _memory(self) -> Memory:
        return self._rng.choices(MEMORIES, _MEMORY_WEIGHTS)[0]

    def _region(self, slot: Slot) -> Region | None:
        homes = {slot.gfns(home) for home in slot.homes}
        return next((region for region in self._truth.regions if region.gfns in homes), None)

    def _piece(self, memory: Memory) -> UaddrRange:
        """A page, a few, many or all."""
        rng, uaddrs = self._rng, memory.uaddrs
        most = rng.choices((1, 8, 64, uaddrs.page_count), (30, 40, 27, 3))[0]
        if most == uaddrs.page_count and memory is not RAM:
            return uaddrs
        count = min(rng.randint(1, most), uaddrs.page_count)
        start = rng.randint(uaddrs.start, uaddrs.end - count)
        return UaddrRange(start=start, end=start + count)
