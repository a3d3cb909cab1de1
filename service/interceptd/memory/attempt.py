"""The two ways in which an intercept is not decided yet: it is being tried, or it has to wait.

Owns these values, and how an attempt begins and ends with the notifier. Must not know which regions there
are, or what is mapped of them.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import trio

from intercept_protocol.addresses import GfnRange
from intercept_protocol.errors import WireError
from intercept_protocol.messages import MmioGranularity
from intercept_protocol.outcomes import Access, Answer
from interceptd.memory.long_lists import LongList
from interceptd.memory.region import Region
from interceptd.mmu_notifier import MmuNotifier, Window
from interceptd.pages.mapping import Extent, Mapping


@dataclass(frozen=True, slots=True)
class Attempt:
    """One VP's optimistic section over a window of uaddrs, from `begin` to `finish`."""

    region: Region
    gfn: int
    access: Access
    window: Window

    @property
    def uaddr_page(self) -> int:
        return self.gfn - self.region.gfns.start + self.region.uaddrs.start

    @property
    def stale(self) -> bool:
        return self.window.stale

    def wanted(self, extents: Iterable[Extent]) -> Iterator[Mapping]:
        """What the extents are to map."""
        for extent in extents:
            assert self.window.uaddrs.covers(extent.uaddrs), "an address space answers within the window"
            yield self.region.mapping(extent)


@dataclass(frozen=True, slots=True)
class Whole:
    """What backs all of a pinned region that is not in the list yet; good until the attempt is stale."""

    attempt: Attempt
    extents: LongList[Extent]


@dataclass(frozen=True, slots=True)
class Busy:
    """The page is in somebody's hands: wait for `until`, and look again; give up with `answer`."""

    until: trio.Event
    answer: Answer


def attempt_at(
    notifier: MmuNotifier, region: Region, gfn: int, access: Access, granularity: MmioGranularity
) -> Busy | Attempt:
    """Begin to rely on what a fault on `gfn` may map, cut back to what is not being invalidated now."""
    faulting = region.uaddrs_of(GfnRange(start=gfn, end=gfn + 1))
    entry = notifier.open_at(faulting)
    if entry is not None:
        return Busy(entry.over, Answer.INVALIDATING)
    going = notifier.invalidation_of(faulting.start)
    if going is not None:  # what is mapped now, the pass to come would take away again
        return Busy(going.done, Answer.INVALIDATING)
    uaddrs = notifier.cut_back(region.uaddrs_of(region.window(gfn, granularity)), faulting.start)
    return Attempt(region, gfn, access, notifier.open_window(uaddrs))


def attempt_over(notifier: MmuNotifier, region: Region) -> Attempt:
    """Begin to rely on all of a pinned region; EFAULT if some of it is being invalidated."""
    if notifier.is_invalidating(region.uaddrs):
        raise unpopulated(region, "it is being invalidated")
    return Attempt(region, region.gfns.start, Access.READ, notifier.open_window(region.uaddrs))


def unpopulated(region: Region, why: str, number: int = errno.EFAULT) -> WireError:
    """The error about a pinned region that cannot be mapped in full."""
    return WireError(number, f"pinned region {region.gfns} cannot be populated: {why}")
