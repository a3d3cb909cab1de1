"""The fake machine: which memory its VMM has, and where its guest sees it.

Owns sizes, addresses and rights, as data; must not know how they are used. Memory of neighbouring BARs is
adjacent in the VMM's address space, so that one unmap can span several.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from intercept_protocol.addresses import GfnRange, UaddrRange
from intercept_protocol.messages import RequestedKind
from intercept_protocol.outcomes import Access

_BASE: Final = 0x1_0000_0000
"""Live memory is mapped here too: far below where Linux maps by default, and far above the program."""
READ_WRITE: Final = Access.READ | Access.WRITE


@dataclass(frozen=True, slots=True)
class Memory:
    """A range of the VMM's address space; the VMM maps and unmaps `parts` of it."""

    name: str
    parts: tuple[UaddrRange, ...]
    access: Access
    io: bool

    @property
    def uaddrs(self) -> UaddrRange:
        return UaddrRange(start=self.parts[0].start, end=self.parts[-1].end)


@dataclass(frozen=True, slots=True)
class Slot:
    """Room for one region, which starts at one of the gfns `homes` at a time."""

    name: str
    kind: RequestedKind
    uaddrs: UaddrRange
    homes: tuple[int, ...]
    access: Access

    def gfns(self, home: int) -> GfnRange:
        return GfnRange(start=home, end=home + self.uaddrs.page_count)


def _pages(start: int, count: int) -> UaddrRange:
    return UaddrRange(start=_BASE + start, end=_BASE + start + count)


NIC = Memory("nic", (_pages(0, 20), _pages(23, 41)), READ_WRITE, io=True)
"""A BAR with a hole: its MSI-X table, which the VMM emulates."""
ROM = Memory("rom", (_pages(64, 16),), Access.READ, io=True)
GPU = Memory("gpu", (_pages(80, 256),), READ_WRITE, io=True)
RAM = Memory("ram", (_pages(0x1000, 700), _pages(0x1000 + 700, 400)), READ_WRITE, io=False)
"""Two VMAs; their border is not a multiple of the 512 pages that one fault maps."""
SHARED = Memory("shared", (_pages(0x2000, 32),), READ_WRITE, io=False)

MEMORIES: Final = (NIC, ROM, GPU, RAM, SHARED)

SLOTS: Final = (
    Slot("nic", RequestedKind.MMIO, NIC.uaddrs, (0xE0000, 0xE1000, 0xE2000), READ_WRITE),
    Slot("rom", RequestedKind.MMIO, ROM.uaddrs, (0xFFF00,), Access.READ),
    Slot("gpu", RequestedKind.AUTO, GPU.uaddrs, (0xF0000, 0xF4000), READ_WRITE),
    Slot("ram", RequestedKind.MOVABLE, RAM.uaddrs, (0x0,), READ_WRITE | Access.EXECUTE),
    Slot("ram alias", RequestedKind.MOVABLE, _pages(0x1000 + 640, 128), (0x4000, 0x4800), READ_WRITE),
    Slot("shared", RequestedKind.PINNED, SHARED.uaddrs, (0x8000,), READ_WRITE),
)

NOWHERE: Final = (0x3FFF, 0xE0FFF, 0xFFFFF, 1 << 35)
"""Gfns at which there is never a region."""
