"""What a VMM may ask about the regions of its partition.

Owns those methods, and making a region of what a request says. Must not know how regions are kept.
"""

from __future__ import annotations

import errno
from collections.abc import Coroutine
from itertools import product

from intercept_protocol import messages
from intercept_protocol.addresses import GfnRange, UaddrRange
from intercept_protocol.elements import about_element
from intercept_protocol.errors import WireError
from intercept_protocol.messages import RegionKind, RequestedKind
from intercept_protocol.outcomes import Access
from interceptd.address_space import Caller, KindUnknown, Undecided
from interceptd.connections.request_loop import Reply
from interceptd.memory.region import KindOrigin, Region, RegionState, kind_of_vma
from interceptd.partition.partition import Partition
from interceptd.scheduling.time_share import give_way

_RIGHTS = {
    (readable, writable, executable): (Access.READ if readable else Access.NONE)
    | (Access.WRITE if writable else Access.NONE)
    | (Access.EXECUTE if executable else Access.NONE)
    for readable, writable, executable in product((False, True), repeat=3)
}
"""By what may be done: a request may bring 128 of them, and uniting flags takes 0.4 us each."""

_STATED = {
    RequestedKind.MMIO: RegionKind.MMIO,
    RequestedKind.MOVABLE: RegionKind.MOVABLE,
    RequestedKind.PINNED: RegionKind.PINNED,
}

RegionCall = messages.AddRegion | messages.RemoveRegion | messages.ChangeRegions


class RegionCalls:
    """Answers them, one at a time."""

    def __init__(self, partition: Partition) -> None:
        self._partition = partition

    def answer(self, call: RegionCall) -> Coroutine[object, object, Reply]:
        match call:
            case messages.AddRegion():
                return self._add(call)
            case messages.RemoveRegion():
                return self._partition.regions.remove_exactly(*_ranges(call))
            case messages.ChangeRegions():
                return self._change(call)

    async def _add(self, call: messages.AddRegion) -> messages.AddRegionReply:
        region = await self._region(call)
        if region.kind is RegionKind.PINNED:
            region.state = RegionState.POPULATING
        await self._partition.regions.add(region)
        if region.kind is RegionKind.PINNED:
            await self._partition.faults.populate(region)
        return messages.AddRegionReply(kind=region.kind)

    async def _change(self, call: messages.ChangeRegions) -> messages.ChangeRegionsReply:
        remove: list[tuple[GfnRange, UaddrRange]] = []
        for index, element in enumerate(call.remove):
            with about_element("remove", index):
                remove.append(_ranges(element))
        add: list[Region] = []
        for index, asked in enumerate(call.add):
            with about_element("add", index):
                add.append(await self._region(asked))
            await give_way()
        await self._partition.faults.change_regions(remove, add)
        return messages.ChangeRegionsReply(kinds=[region.kind for region in add])

    async def _region(self, asked: messages.AddRegion) -> Region:
        """The region that is asked for, not added yet."""
        gfns, uaddrs = _ranges(asked)
        link = self._partition.link
        if link is not None and not link.connected:
            raise WireError(errno.ENOTCONN, "the hypervisor connection comes before the first region")
        return Region(
            gfns=gfns,
            uaddrs=uaddrs,
            kind=_STATED.get(asked.kind) or await self._inferred_kind(uaddrs),
            kind_origin=KindOrigin.INFERRED if asked.kind is RequestedKind.AUTO else KindOrigin.STATED,
            access=access_of(readable=True, writable=asked.writable, executable=asked.executable),
        )

    async def _inferred_kind(self, uaddrs: UaddrRange) -> RegionKind:
        try:
            io = await self._partition.address_space.is_io(uaddrs.start, Caller.VMM)
        except KindUnknown as error:
            raise WireError(errno.EINVAL, f"kind auto: {error}", field="kind") from None
        except Undecided as error:
            raise WireError(error.number, f"kind auto: {error}") from None
        if io is None:
            raise WireError(
                errno.EINVAL,
                f"kind auto: no VMA at start_uaddr {uaddrs.start_uaddr:#x} to tell the kind from",
                field="start_uaddr",
            )
        return kind_of_vma(io)


def _ranges(call: messages.AddRegion | messages.RemoveRegion) -> tuple[GfnRange, UaddrRange]:
    """I3: neither may be empty, misaligned or wrap."""
    gfns = GfnRange.of(call.start_gfn, call.page_count)
    return gfns, UaddrRange.of_pages(call.start_uaddr, call.page_count)


def access_of(*, readable: bool, writable: bool, executable: bool) -> Access:
    return _RIGHTS[readable, writable, executable]
