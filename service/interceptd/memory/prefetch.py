"""Brings pages of a restored guest in before it touches them, in a given order.

Owns the pace: a piece at a time, and none while a fault waits. Must not know who wrote the list of pages, nor
how a page is brought in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Final, Protocol

import trio

from intercept_protocol.addresses import GfnRange
from intercept_protocol.errors import WireError
from interceptd.hypervisor.userfaultfd import PREFETCHING
from interceptd.memory.fault_handler import FaultHandler
from interceptd.memory.prefault import prefault
from interceptd.memory.region_manager import RegionManager

PIECE_PAGES: Final = 64
"""256 KiB: what is brought in before faults are looked at. A block of a region may be larger."""
TOGETHER: Final = 3
"""Pieces that may wait for the image at a time. A worker is left for the faults."""
REFUSED_SECONDS: Final = 0.1
"""Pause after a page that could not be brought in: it may be that none can be."""


class Demand(Protocol):
    """The faults, which come first (`partition/fault_reader.py`)."""

    async def wait_idle(self) -> None: ...


async def prefetch(
    runs: Iterable[GfnRange],
    faults: FaultHandler,
    regions: RegionManager,
    demand: Demand,
    wanted: Callable[[GfnRange], list[GfnRange]],
) -> None:
    """Bring in what is missing of `runs`, nearly in order; what cannot be brought in is left to the guest.

    `wanted` tells which parts of some gfns come from the image: what the VMM gave back does not any more.
    Cancelling is safe at any time.
    """
    pieces = (
        GfnRange(start=start, end=min(start + PIECE_PAGES, run.end))
        for run in runs
        for start in range(run.start, run.end, PIECE_PAGES)
    )

    async def bring_in_pieces() -> None:
        for piece in pieces:
            await trio.lowlevel.checkpoint()
            await demand.wait_idle()
            for part in wanted(piece):
                if not await _bring_in(part, faults, regions):
                    await trio.sleep(REFUSED_SECONDS)

    token = PREFETCHING.set(True)
    try:
        async with trio.open_nursery() as nursery:
            for _ in range(TOGETHER):
                nursery.start_soon(bring_in_pieces)
    finally:
        PREFETCHING.reset(token)


async def _bring_in(part: GfnRange, faults: FaultHandler, regions: RegionManager) -> bool:
    """Whether all of it is in now, as far as that was tried."""
    try:
        progress = await prefault(part, faults, regions)
    except WireError:
        return False
    return progress.mapped_gfns == progress.page_count
