"""When the cyclic garbage collector makes a full pass, which stops everything: 50 us per connection.

Owns the moments. Must not know what is collected. Left to itself, the collector makes one whenever objects
have increased by a quarter, so a client that attaches and detaches VPs decides when. The daemon hardly makes
cycles (tests/service/test_collector.py); young ones are collected as usual, in passes of 1 ms. The collector
visits neither regions, mappings and VMAs nor their lists (`pages/untracked.py`).
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Final

import trio

PERIOD: Final = 60.0
"""Seconds between two full passes."""
FEW: Final = 10_000
"""Objects kept for clients, up to which a pass takes some 2 ms."""
NEVER: Final = 1 << 30


async def collect_while_few(kept: Callable[[], int], collect: Callable[[], object] = gc.collect) -> None:
    """Until cancelled: a full pass in each period at whose end few objects are kept, and no others."""
    young, middle, old = gc.get_threshold()
    gc.set_threshold(young, middle, NEVER)
    try:
        while True:
            await trio.sleep(PERIOD)
            if kept() <= FEW:
                collect()
    finally:
        gc.set_threshold(young, middle, old)
