"""Small regions and backings for the tests of the reference."""

from __future__ import annotations

from typing import Any, Final

from intercept_protocol.addresses import GfnRange, UaddrRange
from intercept_protocol.messages import PartitionStatistics, RegionKind
from intercept_protocol.outcomes import Access
from interceptctl.exercise.clock import Clock, During
from interceptctl.exercise.truth import Truth
from interceptctl.exercise.world import Backing, Frame, Region

READ: Final = Access.READ
WRITE: Final = Access.WRITE
EXECUTE: Final = Access.EXECUTE
READ_WRITE: Final = READ | WRITE

GFN: Final = 0x100
"""The first gfn of `region()`; `PAGE` is what is behind it."""
PAGE: Final = 0x7000
PAGES: Final = 4
UADDRS: Final = UaddrRange(start=PAGE, end=PAGE + PAGES)


def region(
    kind: RegionKind = RegionKind.MMIO, access: Access = READ_WRITE, *, inferred: bool = False
) -> Region:
    """Four pages from `GFN`, backed by the four from `PAGE`."""
    return Region(GfnRange(start=GFN, end=GFN + PAGES), UADDRS, kind, inferred, access)


def backing(pfn: int, access: Access = READ_WRITE, *, io: bool = True) -> Backing:
    return Backing(Frame("host", pfn), access, io)


def statistics(**figures: Any) -> PartitionStatistics:
    """What a daemon says of a partition, where all is 0 but for `figures`."""
    nothing = dict.fromkeys(PartitionStatistics.__struct_fields__, 0)
    return PartitionStatistics(
        **{**nothing, "intercepts": {}, "latency": (), "latency_waited": (), **figures}
    )


class Scene:
    """A truth and its clock; each verb takes two ticks, one for the request and one for its answer."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.truth = Truth(self.clock)

    def map(self, first: Backing, uaddrs: UaddrRange = UADDRS) -> None:
        self.truth.ask_map(uaddrs, first, self.clock.tick()).acknowledge(self.clock.tick())

    def unmap(self, uaddrs: UaddrRange = UADDRS) -> None:
        self.truth.ask_unmap(uaddrs, self.clock.tick()).acknowledge(self.clock.tick())

    def protect(self, access: Access) -> None:
        self.truth.ask_protect(UADDRS, access, self.clock.tick()).acknowledge(self.clock.tick())

    def add(self, added: Region) -> Region:
        self.truth.ask_add(added, self.clock.tick()).acknowledge(self.clock.tick())
        return added

    def remove(self, removed: Region) -> None:
        self.truth.ask_remove(removed, self.clock.tick()).acknowledge(self.clock.tick())

    def now(self) -> During:
        """The time of a question that nothing happens beside."""
        return During(self.clock.tick(), self.clock.tick())
