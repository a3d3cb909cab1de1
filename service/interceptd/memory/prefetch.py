"""Brings pages of a restored guest in before it touches them, in a given order.

Owns the pace: a piece at a time, and none while faults wait. Must not know who wrote the list of pages, nor
how a page is brought in.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from intercept_protocol.addresses import GfnRange
from interceptd.memory.fault_handler import FaultHandler
from interceptd.memory.region_manager import RegionManager


class Demand(Protocol):
    """The faults that come first (`partition/fault_reader.py`)."""

    async def wait_idle(self) -> None: ...
    def note_prefetched(self, page_count: int) -> None: ...


async def prefetch(
    runs: Iterable[GfnRange], faults: FaultHandler, regions: RegionManager, demand: Demand
) -> None:
    """Bring in what is missing of `runs`, in their order. Cancelling is safe at any time."""
    raise NotImplementedError
