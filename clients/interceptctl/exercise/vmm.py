"""The fake VMM: its regions, its controls, and checks of what its guest reaches.

Owns the check after every change that revokes something from the guest. Must not know when what is done, nor
how memory changes.
"""

from __future__ import annotations

import errno
from collections.abc import Sequence
from functools import partial
from typing import Final

from intercept_protocol import messages
from intercept_protocol.addresses import GfnRange, UaddrRange
from intercept_protocol.errors import WireError
from intercept_protocol.messages import (
    MmioGranularity,
    PartitionStatistics,
    RegionKind,
    RequestedKind,
    Translation,
    VpSelection,
)
from intercept_protocol.outcomes import Access

from .clock import During
from .judge import Judge
from .layout import Slot
from .link import Link
from .memory import Memory
from .truth import Truth
from .world import Frame, Region, Sight, kind_of

PROBES: Final = 4
"""How many pages of a range are checked; all of them if there are no more."""


class FakeVmm:
    """`hot` are the gfns where something is changing: guests prefer them."""

    def __init__(self, link: Link, memory: Memory, truth: Truth, judge: Judge) -> None:
        self.hot = GfnRange(start=0, end=1)
        self._link = link
        self._memory = memory
        self._truth = truth
        self._judge = judge

    # ------------------------------------------------ memory

    async def map(self, uaddrs: UaddrRange, access: Access, *, io: bool) -> None:
        self.heat(uaddrs)
        await self._memory.map(uaddrs, access, io=io)

    async def unmap(self, uaddrs: UaddrRange) -> None:
        self.heat(uaddrs)
        await self._memory.unmap(uaddrs)
        await self.probe(uaddrs, "probe after unmap")

    async def protect(self, uaddrs: UaddrRange, access: Access) -> None:
        self.heat(uaddrs)
        await self._memory.protect(uaddrs, access)
        await self.probe(uaddrs, "probe after protect")

    # ------------------------------------------------ regions

    async def add(self, slot: Slot, home: int) -> None:
        """Add the slot's region at `home`, and judge whether it is added or refused."""
        kind = self._kind_of(slot)
        region = Region(slot.gfns(home), slot.uaddrs, kind, slot.kind is RequestedKind.AUTO, slot.access)
        right = f"added as {kind}" if self._can_be_added(slot) else "refused"
        self.hot = region.gfns
        call = messages.AddRegion(
            start_gfn=home,
            page_count=slot.uaddrs.page_count,
            start_uaddr=slot.uaddrs.start_uaddr,
            kind=slot.kind,
            writable=Access.WRITE in slot.access,
            executable=Access.EXECUTE in slot.access,
        )
        with self._truth.question() as asked:
            try:
                reply = await self._link.change(call, partial(self._truth.ask_add, region))
                said = f"added as {reply.kind}"
            except WireError as error:
                if error.number not in (errno.EFAULT, errno.EINVAL):
                    raise
                said = "refused"
                if slot.kind is RequestedKind.PINNED and self._truth.disturbed(slot.uaddrs, asked):
                    right = said  # it was being populated when the invalidation came
        self._judge.addition(slot.name, home, said, right)

    async def remove(self, region: Region) -> None:
        self.hot = region.gfns
        call = messages.RemoveRegion(
            start_gfn=region.gfns.start,
            page_count=region.gfns.page_count,
            start_uaddr=region.uaddrs.start_uaddr,
        )
        await self._link.change(call, partial(self._truth.ask_remove, region))
        await self._probe_gfns(region.gfns, "probe after remove")

    @property
    def shown(self) -> list[GfnRange]:
        """The gfns of all current regions."""
        return [region.gfns for region in self._truth.regions]

    # ------------------------------------------------ controls

    async def set_policy(self, granularity: MmioGranularity) -> None:
        await self._link.steer(messages.SetPolicy(mmio_granularity=granularity))

    async def kick(self, vp_index: int | None) -> None:
        """Kick one VP, or all for None."""
        await self._link.steer(messages.Kick(vp_index=VpSelection.ALL if vp_index is None else vp_index))

    async def statistics(self) -> PartitionStatistics:
        return await self._link.ask(messages.Statistics())

    # ------------------------------------------------ checks

    async def look(self, who: str, gfn: int, resumed_since: int | None = None) -> None:
        """Judge what the guest reaches at `gfn`; see `Judge.sight`."""

        def judge(reached: Translation | None, during: During) -> None:
            self._judge.sight(who, gfn, _sight(reached), during, resumed_since)

        await self._link.look(messages.Translate(gfn=gfn), judge)

    async def probe(self, uaddrs: UaddrRange, why: str) -> None:
        """Check `uaddrs` through every region that shows some of them."""
        for gfns in self._showing(uaddrs):
            await self._probe_gfns(gfns, why)

    def heat(self, uaddrs: UaddrRange) -> None:
        """Something is about to change at `uaddrs`."""
        for gfns in self._showing(uaddrs):
            self.hot = gfns

    async def _probe_gfns(self, gfns: GfnRange, why: str) -> None:
        for gfn in sample(gfns):
            await self.look(why, gfn)

    def _showing(self, uaddrs: UaddrRange) -> list[GfnRange]:
        showing = (region.gfns_of(uaddrs) for region in self._truth.regions)
        return [gfns for gfns in showing if gfns is not None]

    # ------------------------------------------------ expectations

    def _kind_of(self, slot: Slot) -> RegionKind:
        backing = self._truth.backing(slot.uaddrs.start)
        if slot.kind is not RequestedKind.AUTO:
            return RegionKind(slot.kind)
        return RegionKind.MMIO if backing is None else kind_of(backing)

    def _can_be_added(self, slot: Slot) -> bool:
        """`auto` needs a backing to infer the kind from; `pinned` needs all pages backed and readable."""
        match slot.kind:
            case RequestedKind.AUTO:
                return self._truth.backing(slot.uaddrs.start) is not None
            case RequestedKind.PINNED:
                backings = [self._truth.backing(page) for page in range(slot.uaddrs.start, slot.uaddrs.end)]
                return all(backing is not None and Access.READ in backing.access for backing in backings)
            case _:
                return True


def sample(gfns: GfnRange) -> Sequence[int]:
    """All pages of a small range; both ends and pages in between of a larger one."""
    if gfns.page_count <= PROBES:
        return range(gfns.start, gfns.end)
    last = gfns.page_count - 1
    return [gfns.start + last * step // (PROBES - 1) for step in range(PROBES)]


def _sight(reached: Translation | None) -> Sight | None:
    if reached is None:
        return None
    backing, page = reached.frame
    return Sight(Frame(str(backing), page), Access(reached.access))
