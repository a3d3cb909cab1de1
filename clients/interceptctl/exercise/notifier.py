"""The fake VMM's notifiers: they announce invalidations and keep ranges shut.

Owns recording each begin and end in the truth. Must not know what changes in between.
"""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio

from intercept_client import TrioNotifier
from intercept_protocol.addresses import UaddrRange

from .clock import Clock
from .history import FOREVER
from .layout import MEMORIES, SHARED
from .patience import answered_in_time
from .tally import Tally
from .truth import Truth
from .vmm import FakeVmm


class FakeNotifier:
    """One notifier connection, used by one task."""

    def __init__(self, client: TrioNotifier, clock: Clock, truth: Truth, tally: Tally, vmm: FakeVmm) -> None:
        self._client = client
        self._clock = clock
        self._truth = truth
        self._tally = tally
        self._vmm = vmm

    async def invalidate(self, uaddrs: UaddrRange) -> None:
        """Announce that something changed at `uaddrs`."""
        self._tally.steps += 1
        self._vmm.heat(uaddrs)
        invalidation = self._truth.ask_invalidation(uaddrs, self._clock.tick())
        with answered_in_time():
            await self._client.invalidate(uaddrs)
        invalidation.gone = self._clock.tick()
        await self._vmm.probe(uaddrs, "probe after invalidate")

    @asynccontextmanager
    async def shutting(self, uaddrs: UaddrRange) -> AsyncIterator[None]:
        """Within the block no guest can reach `uaddrs`."""
        self._tally.steps += 1
        self._vmm.heat(uaddrs)
        invalidation = self._truth.ask_invalidation(uaddrs, self._clock.tick())
        with answered_in_time():
            async with self._client.invalidation(uaddrs):
                invalidation.gone = self._clock.tick()
                invalidation.shut_until = FOREVER
                await self._vmm.probe(uaddrs, "probe after begin")
                yield
                await self._vmm.probe(uaddrs, "probe before end")
                self._tally.steps += 1
                invalidation.shut_until = self._clock.tick()


async def disturb(notifier: FakeNotifier, turns: trio.MemoryReceiveChannel[None], rng: random.Random) -> None:
    """A second thread of the VMM that announces random ranges while the first changes memory.

    It never announces pinned memory: that breaks a promise, and makes the outcome of an add random.
    """
    memories = [memory for memory in MEMORIES if memory is not SHARED]
    async for _ in turns:
        uaddrs = rng.choice(memories).uaddrs
        start = rng.randrange(uaddrs.start, uaddrs.end)
        piece = UaddrRange(start=start, end=min(uaddrs.end, start + rng.randint(1, 64)))
        if rng.random() < 0.5:
            await notifier.invalidate(piece)
        else:
            async with notifier.shutting(piece):
                pass
