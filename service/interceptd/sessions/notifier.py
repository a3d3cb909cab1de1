"""One notifier connection: a VMM thread announces that memory is going.

Owns the begins of this connection that have no end yet: they end with it. Must not know what is mapped.
"""

from __future__ import annotations

import errno
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine

from intercept_protocol import messages
from intercept_protocol.addresses import UaddrRange
from intercept_protocol.errors import WireError
from intercept_protocol.messages import NotifierCall
from interceptd.address_space import Undecided
from interceptd.memory.region_manager import RegionManager
from interceptd.mmu_notifier import Batch, MmuNotifier
from interceptd.scheduling.time_share import give_way_shielded


async def unwatched(answering: Awaitable[object]) -> object:
    return await answering


class NotifierSession:
    """`kick` carries out a kick. `catch_up` takes in what changed before without a word, where memory can; it
    may raise `Undecided`. `watched` awaits something as long as the connection lives: it costs 10 us, and is
    not used for a pass, which nothing breaks off."""

    def __init__(
        self,
        notifier: MmuNotifier,
        regions: RegionManager,
        kick: Callable[[messages.Kick], Coroutine[object, object, None]],
        catch_up: Callable[[], Awaitable[None]] | None = None,
        watched: Callable[[Awaitable[object]], Awaitable[object]] = unwatched,
    ) -> None:
        self._notifier = notifier
        self._regions = regions
        self._kick = kick
        self._watched = watched
        self._catch_up = catch_up
        self._begun: Counter[UaddrRange] = Counter()

    def answer(self, call: NotifierCall) -> Coroutine[object, object, None] | None:
        """Begin and invalidate are answered once the guest can no longer reach the range."""
        if isinstance(call, messages.Kick):
            return self._carry_out(call)
        uaddrs = UaddrRange.of_bytes(call.start_uaddr, call.length)
        match call:
            case messages.InvalidateBegin():
                return self._begin(uaddrs)
            case messages.Invalidate():
                return self._invalidate(uaddrs)
            case messages.InvalidateEnd():
                self._end(uaddrs)
        return None

    def take_over(self, begun: Counter[UaddrRange]) -> None:
        """Take over the open ranges that a predecessor's session began."""
        self._begun = begun

    async def close(self) -> None:
        """End what this connection began: it cannot any more."""
        for uaddrs in list(self._begun.elements()):
            self._end(uaddrs)
            await give_way_shielded()

    async def _carry_out(self, kick: messages.Kick) -> None:
        await self._watched(self._kick(kick))

    async def _begin(self, uaddrs: UaddrRange) -> None:
        batch = self._notifier.begin(uaddrs, ring=False)
        self._begun[uaddrs] += 1
        await self._wait_served(batch)

    async def _invalidate(self, uaddrs: UaddrRange) -> None:
        await self._wait_served(self._notifier.invalidate(uaddrs, ring=False))
        if self._catch_up is not None:
            try:
                await self._watched(self._catch_up())
            except Undecided as error:
                raise WireError(
                    errno.ETIMEDOUT, f"{uaddrs} is invalidated; changes of no event may be left: {error}"
                ) from None

    async def _wait_served(self, batch: Batch) -> None:
        await self._regions.serve_now()
        if not batch.done.is_set():
            await self._watched(batch.done.wait())

    def _end(self, uaddrs: UaddrRange) -> None:
        if not self._begun[uaddrs]:
            raise WireError(errno.ENOENT, f"this connection has no begin of just {uaddrs} to end")
        self._begun[uaddrs] -= 1
        if not self._begun[uaddrs]:
            del self._begun[uaddrs]  # a Counter keeps its zeroes, and every range may be another
        self._notifier.end(uaddrs)
