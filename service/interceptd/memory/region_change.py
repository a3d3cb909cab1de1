"""The plan of a change from some regions to others: what stays, what goes and what comes.

Owns the comparison of the regions before with those after. Pages that both give the guest alike stay mapped.
Must not know what is mapped, nor how a change is carried out.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from intercept_protocol.addresses import GfnRange
from interceptd.memory.region import Piece, Region, RegionState


class Kept(NamedTuple):
    """Gfns that an old and a new region cover alike."""

    old: Region
    new: Region
    gfns: GfnRange


class RegionChange:
    """From the regions `old` to `new`. Those of either are disjoint. Everything is in the order of gfns."""

    __slots__ = ("changing", "coming", "going", "kept", "new", "old")

    def __init__(self, old: Iterable[Region], new: Iterable[Region]) -> None:
        self.old = sorted(old, key=_start)
        self.new = sorted(new, key=_start)
        self.kept = list(_kept(self.old, self.new))
        stays = [kept.gfns for kept in self.kept]
        self.going = list(_without(self.old, stays))
        """What the guest must lose."""
        self.coming = list(_without(self.new, stays))
        """What the guest gets instead."""
        self.changing = union(gfns for _, gfns in (*self.going, *self.coming))
        """The gfns of either, on which faults wait."""


def _start(region: Region) -> int:
    return region.gfns.start


def _kept(old: Sequence[Region], new: Sequence[Region]) -> Iterator[Kept]:
    i = j = 0
    while i < len(old) and j < len(new):
        before, after = old[i], new[j]
        both = before.gfns.clip(after.gfns)
        if both is not None and _alike(before, after):
            yield Kept(before, after, both)
        if before.gfns.end <= after.gfns.end:
            i += 1
        else:
            j += 1


def _alike(before: Region, after: Region) -> bool:
    """Whether what was mapped of one may stay mapped of the other: the same memory, kind and rights. Nothing
    may be mapped of a dangling region, and its successor is to be whole."""
    return (
        before.uaddrs.start - before.gfns.start == after.uaddrs.start - after.gfns.start
        and before.kind is after.kind
        and before.kind_origin is after.kind_origin
        and before.access is after.access
        and before.state is RegionState.LIVE
    )


def _without(regions: Sequence[Region], stays: Sequence[GfnRange]) -> Iterator[Piece]:
    """The parts of `regions` outside `stays`, each of which lies in one of them."""
    at = 0
    for region in regions:
        start, end = region.gfns.start, region.gfns.end
        while at < len(stays) and stays[at].end <= end:
            if start < stays[at].start:
                yield region, GfnRange(start=start, end=stays[at].start)
            start = stays[at].end
            at += 1
        if start < end:
            yield region, GfnRange(start=start, end=end)


def union(ranges: Iterable[GfnRange]) -> list[GfnRange]:
    """The same pages, as few ranges."""
    union: list[GfnRange] = []
    for gfns in sorted(ranges):
        if union and gfns.start <= union[-1].end:
            union[-1] = GfnRange(start=union[-1].start, end=max(union[-1].end, gfns.end))
        else:
            union.append(gfns)
    return union
