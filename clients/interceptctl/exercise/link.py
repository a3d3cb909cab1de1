"""The fake VMM's connection; every request and reply on it gets a tick.

Owns the order of requests, and counts those that change something. Requests are serialised here, so a request
gets its tick when it is sent, not when it is queued: no two overlap in logical time. Must not know what they
mean.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial
from typing import Protocol, TypeVar

import trio

from intercept_client import TrioVmm
from intercept_protocol.errors import WireError
from intercept_protocol.messages import Call

from .clock import Clock, During
from .patience import answered_in_time
from .tally import Tally

Reply = TypeVar("Reply")


class Edit(Protocol):
    """A requested change of the truth."""

    def acknowledge(self, at: int) -> None: ...

    def refuse(self, at: int) -> None: ...


class Link:
    def __init__(self, client: TrioVmm, clock: Clock, tally: Tally) -> None:
        self._client = client
        self._clock = clock
        self._tally = tally
        self._turn = trio.Lock()

    async def steer(self, call: Call[None]) -> None:
        """A request that changes how the daemon works, but not the truth."""
        self._tally.steps += 1
        await self.ask(call)

    async def ask(self, call: Call[Reply]) -> Reply:
        """A request that changes nothing."""
        async with self._turn:
            with answered_in_time():
                return await self._client.call(call)

    async def change(self, call: Call[Reply], ask: Callable[[int], Edit]) -> Reply:
        """A request that changes the truth: `ask` records how, given the tick at which it is sent.

        Raises `WireError` if it is refused; the truth is then unchanged.
        """
        return await self.perform(partial(self._client.call, call), ask)

    async def perform(self, act: Callable[[], Awaitable[Reply]], ask: Callable[[int], Edit]) -> Reply:
        """Like `change`, for a change that takes more than one request, or none."""
        self._tally.steps += 1
        async with self._turn:
            edit = ask(self._clock.tick())
            try:
                with answered_in_time():
                    reply = await act()
            except WireError:
                edit.refuse(self._clock.tick())
                raise
            edit.acknowledge(self._clock.tick())
        return reply

    async def look(self, call: Call[Reply], judge: Callable[[Reply, During], None]) -> None:
        """A question about the truth: `judge` gets the reply and its time while the question is open."""
        async with self._turn:
            with self._clock.question() as asked, answered_in_time():
                reply = await self._client.call(call)
                judge(reply, During(asked, self._clock.tick()))
