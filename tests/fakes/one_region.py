"""The one region that most tests of the core look at, and the VMA behind it.

Owns where they lie. What a test does with them is its own.
"""

from __future__ import annotations

from typing import Final

from fakes.model_partition import ModelPartition
from intercept_protocol.messages import RegionKind

GFN: Final = 0x100
PAGE: Final = 0x9000
"""The page of the VMM's that backs the first gfn."""
PFN: Final = 0x7000
"""What it leads to."""
PAGES: Final = 16


async def with_region(
    model: ModelPartition, kind: RegionKind | None = RegionKind.MMIO, *, io: bool = False
) -> None:
    """`kind` None is read off the VMA, which is of device memory if `io`."""
    await model.map_vma(PAGE, PAGES, PFN, io=io)
    await model.add_region(GFN, PAGES, PAGE, kind)
