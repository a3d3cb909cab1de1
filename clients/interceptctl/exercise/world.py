"""The state of a VMM's memory and regions, and the right answers to one access in one state.

Owns backings, regions and the decision; must not know time. This implements the protocol's promise a second
time, page by page and without regard for speed: the daemon is compared with something simpler than itself.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from intercept_protocol.addresses import GfnRange, UaddrRange
from intercept_protocol.messages import RegionKind
from intercept_protocol.outcomes import Access, Answer

RESUMED = frozenset({Answer.MAPPED, Answer.ALREADY_MAPPED})


class Frame(NamedTuple):
    """What stands behind one page."""

    backing: str
    page: int

    def ahead(self, pages: int) -> Frame:
        return Frame(self.backing, self.page + pages)


@dataclass(frozen=True, slots=True)
class Backing:
    """One page of a VMA: its frame, the VMA's rights, and whether it is device memory (VM_IO)."""

    frame: Frame
    access: Access
    io: bool

    def ahead(self, pages: int) -> Backing:
        return Backing(self.frame.ahead(pages), self.access, self.io)


class Sight(NamedTuple):
    """What a guest reaches at a page."""

    frame: Frame
    access: Access

    def __str__(self) -> str:
        return f"{self.frame.backing} page {self.frame.page:#x} {rights_text(self.access)}"


@dataclass(slots=True)
class Invalidation:
    """A uaddr range that was announced at `asked` and that no guest could reach from `gone` on.

    From `gone` until `shut_until`, between begin and end, nothing in it can be mapped.
    """

    uaddrs: UaddrRange
    asked: int
    gone: int
    shut_until: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class Region:
    """One region from its add to its remove; added again, it is a new one."""

    gfns: GfnRange
    uaddrs: UaddrRange
    kind: RegionKind
    inferred: bool
    """The kind was inferred from the VMA (`auto`), and applies only while the VMA is of that kind."""
    access: Access
    hits: list[Invalidation] = field(default_factory=list, repr=False)
    """Invalidations of a pinned region, each of which broke the VMM's promise."""

    def uaddr_page(self, gfn: int) -> int:
        return gfn - self.gfns.start + self.uaddrs.start

    def gfns_of(self, uaddrs: UaddrRange) -> GfnRange | None:
        """The gfns at which the guest sees the part of `uaddrs` that the region shows."""
        clipped = self.uaddrs.clip(uaddrs)
        if clipped is None:
            return None
        shift = self.gfns.start - self.uaddrs.start
        return GfnRange(start=clipped.start + shift, end=clipped.end + shift)


def kind_of(backing: Backing) -> RegionKind:
    """The kind that `auto` infers from a VMA."""
    return RegionKind.MMIO if backing.io else RegionKind.MOVABLE


def rights(region: Region, backing: Backing) -> Access:
    """Read and write need both rights. Execute is the region's, on readable pages."""
    both = region.access & backing.access & (Access.READ | Access.WRITE)
    return both | (region.access & Access.EXECUTE) if Access.READ in both else both


def sight(region: Region | None, backing: Backing | None) -> Sight | None:
    """The most that a guest may reach in this state; None for nothing."""
    if region is None or backing is None or (region.inferred and kind_of(backing) is not region.kind):
        return None
    access = rights(region, backing)
    return Sight(backing.frame, access) if access else None


def decide(region: Region | None, backing: Backing | None, access: Access) -> frozenset[Answer]:
    """The right answers to an access in this state, besides RETRY."""
    if region is None:
        return frozenset({Answer.NO_REGION})
    if access not in region.access:
        return frozenset({Answer.PERMISSION})
    if backing is None or (region.inferred and kind_of(backing) is not region.kind):
        return frozenset({Answer.UNBACKED})
    return RESUMED if access in rights(region, backing) else frozenset({Answer.PERMISSION})


def rights_text(access: Access) -> str:
    return "".join(
        letter if right in access else "-"
        for right, letter in ((Access.READ, "r"), (Access.WRITE, "w"), (Access.EXECUTE, "x"))
    )
