"""The MMU-notifier channel: what is known to be going, and who is in the middle of relying on it.

Owns the attempts in flight, the invalidations that are open and those that are pending. Every change here is
one synchronous step, so an invalidation source waits for nothing: its munmap may be blocked until we return.
Must not know regions, the lock or the hypervisor.
"""

from __future__ import annotations

import errno
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from time import perf_counter_ns

import trio

from intercept_protocol.addresses import PAGE_LIMIT, UaddrRange
from intercept_protocol.errors import WireError
from intercept_protocol.events import InvalidationBegun, InvalidationEnded, RangeInvalidated
from interceptd.pages.interval_index import IntervalIndex
from interceptd.pages.range_map import RangeMap
from interceptd.telemetry.counters import Source
from interceptd.telemetry.event_bus import Publisher
from interceptd.telemetry.histogram import LatencyHistogram

PENDING_PIECES = 1024
"""Beyond this many disjoint pieces the pending set becomes "everything": bounded memory, and still right."""
EVERYTHING = UaddrRange(start=0, end=PAGE_LIMIT)


@dataclass(slots=True, eq=False)
class Window:
    """The uaddrs that one optimistic section relies on, from `open_window` to `close_window`.

    An invalidation that overlaps them makes it stale, and nothing makes it fresh again.
    """

    uaddrs: UaddrRange
    stale: bool = False
    closed: trio.Event | None = None
    """Made for those who wait for it."""


@dataclass(slots=True, eq=False)
class OpenInvalidation:
    """A range between begin and end. Equal begins nest: they are counted."""

    uaddrs: UaddrRange
    depth: int = 0
    over: trio.Event = field(default_factory=trio.Event)


class Batch:
    """The invalidations that one pass of the region manager serves."""

    __slots__ = ("_pieces", "began_ns", "collapsed", "done")

    def __init__(self) -> None:
        self._pieces: RangeMap[UaddrRange] = RangeMap()
        self.began_ns: int | None = None
        """When the oldest of them came, by the performance counter; None while there is none."""
        self.collapsed = False
        """Whether the pieces were too many, and all that is known is that some of everything is going."""
        self.done = trio.Event()
        """Set once no SLAT entry is left that was made from the old frames."""

    def __contains__(self, page: int) -> bool:
        return self._pieces.find(page) is not None

    def touches(self, uaddrs: UaddrRange) -> bool:
        return self._pieces.touches(uaddrs)

    @property
    def pieces(self) -> list[UaddrRange]:
        return list(self._pieces)

    def add(self, uaddrs: UaddrRange) -> None:
        if self.began_ns is None:
            self.began_ns = perf_counter_ns()
        self._pieces.carve(uaddrs)
        self._pieces.insert(uaddrs)
        if len(self._pieces) > PENDING_PIECES:
            self._pieces.carve(EVERYTHING)
            self._pieces.insert(EVERYTHING)
            self.collapsed = True


class MmuNotifier:
    """One partition's channel from the invalidation sources to its region manager."""

    def __init__(self, open_limit: Callable[[], int], event_bus: Publisher) -> None:
        self._open_limit = open_limit
        self._event_bus = event_bus
        self._windows: set[Window] = set()
        self._listeners: list[Callable[[UaddrRange], None]] = []
        self._open: dict[UaddrRange, OpenInvalidation] = {}
        self._open_index: IntervalIndex[OpenInvalidation] = IntervalIndex()
        self._open_depth = 0
        self._pending = Batch()
        self._serving: Batch | None = None
        self._going = False
        self._ring, self._doorbell = trio.open_memory_channel[None](1)
        self.by_source: Counter[Source] = Counter()
        self.stale_windows = 0
        self.passes = LatencyHistogram()
        """From the oldest invalidation of a batch until all of it is served."""

    # ------------------------------------------------ sources

    @property
    def invalidations(self) -> int:
        return self.by_source.total()

    def invalidate(self, uaddrs: UaddrRange, source: Source = Source.NOTIFIER) -> Batch:
        """The frames behind `uaddrs` are going or gone. Wait for the batch's `done` before saying so."""
        self._event_bus.publish(
            RangeInvalidated(
                source=source.value, start_uaddr=uaddrs.start_uaddr, page_count=uaddrs.page_count
            )
        )
        return self._invalidate(uaddrs, source)

    def _invalidate(self, uaddrs: UaddrRange, source: Source) -> Batch:
        self.by_source[source] += 1
        self.mark_stale(uaddrs)
        self._pending.add(uaddrs)
        self._going = True
        with suppress(trio.WouldBlock):  # already rung: the pass to come takes this one along
            self._ring.send_nowait(None)
        return self._pending

    def begin(self, uaddrs: UaddrRange, source: Source = Source.NOTIFIER) -> Batch:
        """Invalidate, and keep faults out until the matching `end`. Raises ENOSPC at the limit."""
        if self._open_depth >= (limit := self._open_limit()):
            raise WireError(
                errno.ENOSPC,
                f"a partition may have {limit} open invalidations",
                limit="open_invalidations_per_partition",
            )
        entry = self._open.get(uaddrs)
        if entry is None:
            entry = self._open[uaddrs] = OpenInvalidation(uaddrs)
            self._open_index.add(uaddrs, uaddrs.end, entry)
        entry.depth += 1
        self._open_depth += 1
        self._event_bus.publish(
            InvalidationBegun(
                source=source.value, start_uaddr=uaddrs.start_uaddr, page_count=uaddrs.page_count
            )
        )
        return self._invalidate(uaddrs, source)

    def end(self, uaddrs: UaddrRange, source: Source = Source.NOTIFIER) -> None:
        """End one begin of just this range; the last one lets the waiting faults go on."""
        self._event_bus.publish(
            InvalidationEnded(
                source=source.value, start_uaddr=uaddrs.start_uaddr, page_count=uaddrs.page_count
            )
        )
        entry = self._open[uaddrs]
        entry.depth -= 1
        self._open_depth -= 1
        if not entry.depth:
            del self._open[uaddrs]
            self._open_index.remove(uaddrs, uaddrs.end)
            self._tell(uaddrs)
            entry.over.set()

    @property
    def open_invalidations(self) -> int:
        return self._open_depth

    # ------------------------------------------------ optimistic sections

    def open_window(self, uaddrs: UaddrRange) -> Window:
        """Start relying on `uaddrs`, none of which may lie in an open invalidation."""
        window = Window(uaddrs)
        self._windows.add(window)
        return window

    def close_window(self, window: Window) -> None:
        self._windows.discard(window)
        if window.closed is not None:
            window.closed.set()

    async def wait_windows_closed(self) -> None:
        """Block until nobody relies any more on what was looked at before the call."""
        for closed in [_closed(window) for window in self._windows]:
            await closed.wait()

    def mark_stale(self, uaddrs: UaddrRange) -> None:
        """Whoever relies on these pages must look again."""
        self._tell(uaddrs)
        for window in self._windows:
            if not window.stale and window.uaddrs.overlaps(uaddrs):
                window.stale = True
                self.stale_windows += 1

    def listen(self, listener: Callable[[UaddrRange], None]) -> None:
        """Have `listener` called, in the same step, with the pages of which nothing that was learned may be
        used any more: when they go stale, and when an open invalidation ends, as it changed them at any time
        since its begin."""
        self._listeners.append(listener)

    def _tell(self, uaddrs: UaddrRange) -> None:
        for listener in self._listeners:
            listener(uaddrs)

    def open_at(self, uaddrs: UaddrRange) -> OpenInvalidation | None:
        """An open invalidation that touches these pages."""
        return next(self._open_index.overlapping(uaddrs), None)

    def is_invalidating(self, uaddrs: UaddrRange) -> bool:
        """Whether some of these pages are in an open invalidation, or in one that is not served yet."""
        batches = (self._pending, self._serving)
        return self.open_at(uaddrs) is not None or any(
            batch is not None and batch.touches(uaddrs) for batch in batches
        )

    def cut_back(self, uaddrs: UaddrRange, page: int) -> UaddrRange:
        """The largest part of `uaddrs` around `page` that touches no invalidation that is open now."""
        start, end = uaddrs.start, uaddrs.end
        for entry in self._open_index.overlapping(uaddrs):
            if entry.uaddrs.end <= page:
                start = max(start, entry.uaddrs.end)
            else:
                end = min(end, entry.uaddrs.start)
        return UaddrRange(start=start, end=end)

    # ------------------------------------------------ the region manager's end

    def invalidation_of(self, page: int) -> Batch | None:
        """The invalidation of `page` that is known and not served yet: what is mapped of it is no answer."""
        if not self._going:
            return None
        for batch in (self._pending, self._serving):
            if batch is not None and page in batch:
                return batch
        return None

    async def wait_rung(self) -> None:
        """Block until it was rung for something that is not served yet."""
        await self._doorbell.receive()
        while not self._going:  # whoever rang has served it
            await self._doorbell.receive()

    async def wait_served(self) -> None:
        """Block until all that was invalidated before the call is served."""
        if self._going:
            last = self._pending if self._pending.pieces else self._serving
            assert last is not None, "what is going is pending or being served"
            await last.done.wait()

    def take(self) -> Batch:
        """What is pending now. Call it under the region lock: one pass then serves all that came before."""
        self._serving, self._pending = self._pending, Batch()
        return self._serving

    def served(self, batch: Batch) -> None:
        """Nothing is left that was made from the old frames: let those know who wait for it."""
        if batch.began_ns is not None:
            self.passes.record(perf_counter_ns() - batch.began_ns)
        self._serving = None
        self._going = bool(self._pending.pieces)
        batch.done.set()


def _closed(window: Window) -> trio.Event:
    if window.closed is None:
        window.closed = trio.Event()
    return window.closed
