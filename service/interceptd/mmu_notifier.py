"""The MMU-notifier channel: which memory is being invalidated, and which attempts rely on it.

Owns the windows of the attempts in flight, and the open and the pending invalidations. Every change is one
synchronous step, so an invalidation source never waits: its munmap may be blocked until we return. Must not
know regions, the lock or the hypervisor.
"""

from __future__ import annotations

import errno
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from time import monotonic_ns, perf_counter_ns

import trio

from intercept_protocol.addresses import PAGE_LIMIT, UaddrRange
from intercept_protocol.errors import WireError
from intercept_protocol.events import InvalidationBegun, InvalidationEnded, RangeInvalidated
from interceptd.ledger.journal import Journal
from interceptd.pages.interval_index import IntervalIndex
from interceptd.pages.range_bounds import RangeBounds
from interceptd.pages.range_map import RangeMap
from interceptd.quota import Quota
from interceptd.telemetry.counters import Source
from interceptd.telemetry.event_bus import Publisher
from interceptd.telemetry.histogram import LatencyHistogram
from interceptd.telemetry.trace import Trace

PENDING_PIECES = 256
"""Beyond this many disjoint pieces the pending set becomes "everything": memory stays bounded, and
invalidating too much is still correct. Sources wait for their invalidations, so there are as many pieces as
threads of the VMM that change memory at once. Of 120 bytes each; `Cost.PARTITION` has room for two sets."""
ALWAYS_OPEN = 16
"""So many a notifier connection may begin whatever memory is left, and a VMM's `unmap_vma` always: what lets
memory go is not refused."""
FEW_OPEN = 8
"""Open invalidations among which a search is faster than an index, which takes 5 us for each."""
UNREPEATED = frozenset({Source.USERFAULTFD, Source.COMPARISON})
"""What a successor must be told; the other sources are requests, which it finds and carries out."""
EVERYTHING = UaddrRange(start=0, end=PAGE_LIMIT)


@dataclass(slots=True, eq=False)
class Window:
    """The uaddrs that one optimistic section relies on, from `open_window` to `close_window`.

    An overlapping invalidation makes it stale for good.
    """

    uaddrs: UaddrRange
    stale: bool = False
    closed: trio.Event | None = None
    """Created by the first task that waits for it."""
    is_attempt: bool = True
    """Whether it counts when it becomes stale. A look is part of an attempt, and reaches beyond it."""

    @property
    def teaches(self) -> bool:
        """Whether what was looked up in it may outlive it: it is not stale, and nobody waits for its end to
        whom it would be too old."""
        return not self.stale and self.closed is None


@dataclass(slots=True, eq=False)
class OpenInvalidation:
    """A range between begin and end. Begins of the same range nest; `depth` counts them."""

    uaddrs: UaddrRange
    since_ns: int
    """When the first of them began, by the monotonic clock."""
    depth: int = 0
    over: trio.Event = field(default_factory=trio.Event)


class Batch:
    """The invalidations that one pass of the region manager serves."""

    __slots__ = ("_first", "_pieces", "announced", "began_ns", "collapsed", "done", "gone_count")

    def __init__(self) -> None:
        self._first: UaddrRange | None = None
        """While it is the only one: a map takes as long as all the rest of a small batch."""
        self._pieces: RangeMap[UaddrRange] | None = None
        """Created for the second one."""
        self.began_ns: int | None = None
        """When the oldest one was announced, by the performance counter; None while the batch is empty."""
        self.announced = 0
        """How many invalidations were added."""
        self.collapsed = False
        """Whether there were too many pieces, so that the batch stands for everything."""
        self.gone_count = 0
        """What the journal has counted by the time it was taken."""
        self.done = trio.Event()
        """Set once no SLAT entry made from the old frames is left."""

    def __contains__(self, page: int) -> bool:
        if self._pieces is not None:
            return self._pieces.find(page) is not None
        return self._first is not None and page in self._first

    def touches(self, uaddrs: UaddrRange) -> bool:
        if self._pieces is not None:
            return self._pieces.touches(uaddrs)
        return self._first is not None and self._first.overlaps(uaddrs)

    @property
    def empty(self) -> bool:
        return self._first is None

    @property
    def pieces(self) -> list[UaddrRange]:
        if self._pieces is not None:
            return list(self._pieces)
        return [] if self._first is None else [self._first]

    def add(self, uaddrs: UaddrRange) -> None:
        self.announced += 1
        if self._first is None:
            self.began_ns = perf_counter_ns()
            self._first = uaddrs
            return
        if self._pieces is None:
            self._pieces = RangeMap()
            self._pieces.insert(self._first)
        self._pieces.carve(uaddrs)
        self._pieces.insert(uaddrs)
        if len(self._pieces) > PENDING_PIECES:
            self._pieces = RangeMap()  # to carve hundreds of pieces takes long
            self._pieces.insert(EVERYTHING)
            self.collapsed = True


class MmuNotifier:
    """One partition's channel from the invalidation sources to its region manager."""

    def __init__(
        self,
        open_limit: Callable[[], int],
        event_bus: Publisher,
        journal: Journal | None = None,
        quota: Quota | None = None,
    ) -> None:
        """`quota` counts the open invalidations of the uid."""
        self._open_limit = open_limit
        self._quota = quota
        self._journal = journal
        self._event_bus = event_bus
        self._windows: set[Window] = set()
        self._listeners: list[Callable[[UaddrRange], None]] = []
        self._forget: list[Callable[[UaddrRange], None]] = []
        self._open: dict[UaddrRange, OpenInvalidation] = {}
        self._open_index: IntervalIndex[OpenInvalidation] | None = None
        """Created when there are more than a few for the first time."""
        self._open_bounds = RangeBounds()
        self._open_depth = 0
        self._pending = Batch()
        self._serving: Batch | None = None
        self._unserved = False
        self._ring, self._doorbell = trio.open_memory_channel[None](1)
        self.by_source: Counter[Source] = Counter()
        self.stale_windows = 0
        self.trace: Trace | None = None
        self.passes = LatencyHistogram()
        """From the oldest invalidation of a batch until the whole batch is served."""

    # ------------------------------------------------ sources

    @property
    def quiet(self) -> bool:
        """Whether nothing is being invalidated: no range is open, and all that was announced is served."""
        return not (self._unserved or self._open_depth)

    @property
    def invalidations(self) -> int:
        return self.by_source.total()

    def invalidate(self, uaddrs: UaddrRange, source: Source = Source.NOTIFIER, *, ring: bool = True) -> Batch:
        """The frames behind `uaddrs` are going or gone. Wait for the batch's `done` before acknowledging.

        It rings for the region manager's task, unless the caller has the invalidation served in the same step
        (`RegionManager.serve_now`).
        """
        if self._journal is not None and source in UNREPEATED:
            self._journal.gone(uaddrs.start, uaddrs.end)
        return self.invalidate_again(uaddrs, source, ring=ring)

    def invalidate_again(self, uaddrs: UaddrRange, source: Source, *, ring: bool = True) -> Batch:
        """`invalidate`, of what a predecessor has recorded and not served."""
        self._event_bus.publish(
            RangeInvalidated(
                source=source.value, start_uaddr=uaddrs.start_uaddr, page_count=uaddrs.page_count
            )
        )
        return self._invalidate(uaddrs, source, ring=ring)

    def _invalidate(self, uaddrs: UaddrRange, source: Source, *, ring: bool) -> Batch:
        self.by_source[source] += 1
        self.mark_stale(uaddrs)
        self._pending.add(uaddrs)
        self._unserved = True
        if ring:
            self.ring()
        return self._pending

    def ring(self) -> None:
        """Have the region manager's task serve what is pending."""
        with suppress(trio.WouldBlock):  # already rung: the coming pass serves this one too
            self._ring.send_nowait(None)

    def begin(self, uaddrs: UaddrRange, source: Source = Source.NOTIFIER, *, ring: bool = True) -> Batch:
        """Invalidate, and hold faults until the matching `end`. Raises ENOSPC at the limit. `ring` as for
        `invalidate`."""
        if self._open_depth >= (limit := self._open_limit()):
            raise WireError(
                errno.ENOSPC,
                f"a partition may have {limit} open invalidations",
                limit="open_invalidations_per_partition",
            )
        if self._quota is not None and source is Source.NOTIFIER and self._open_depth >= ALWAYS_OPEN:
            self._quota.require(1)
        return self.reopen(uaddrs, source, ring=ring)

    def reopen(self, uaddrs: UaddrRange, source: Source = Source.NOTIFIER, *, ring: bool = True) -> Batch:
        """`begin`, whatever the limit is: a predecessor has done so."""
        entry = self._open.get(uaddrs)
        if entry is None:
            entry = self._open[uaddrs] = OpenInvalidation(uaddrs, monotonic_ns())
            self._open_bounds.add(uaddrs)
            if self._open_index is not None:
                self._open_index.add(uaddrs, 0, entry)
            elif len(self._open) > FEW_OPEN:
                self._open_index = IntervalIndex()
                for each in self._open.values():
                    self._open_index.add(each.uaddrs, 0, each)
        entry.depth += 1
        self._open_depth += 1
        if self._quota is not None:
            self._quota.add(1)
        self._event_bus.publish(
            InvalidationBegun(
                source=source.value, start_uaddr=uaddrs.start_uaddr, page_count=uaddrs.page_count
            )
        )
        return self._invalidate(uaddrs, source, ring=ring)

    def end(self, uaddrs: UaddrRange, source: Source = Source.NOTIFIER) -> None:
        """Match one `begin` of exactly this range; after the last one the waiting faults continue."""
        self._event_bus.publish(
            InvalidationEnded(
                source=source.value, start_uaddr=uaddrs.start_uaddr, page_count=uaddrs.page_count
            )
        )
        entry = self._open[uaddrs]
        entry.depth -= 1
        self._open_depth -= 1
        if self._quota is not None:
            self._quota.release()
        if not entry.depth:
            del self._open[uaddrs]
            self._open_bounds.remove(uaddrs)
            if self._open_index is not None:
                self._open_index.remove(uaddrs, 0)
            self._call_listeners(uaddrs)
            entry.over.set()

    def discard(self) -> None:
        """The partition has ended: nothing is open any more, not even what nobody is left to end."""
        if self._quota is not None:
            self._quota.release(self._open_depth)
        self._open_depth = 0

    @property
    def open_invalidations(self) -> int:
        return self._open_depth

    @property
    def oldest_open_ms(self) -> int:
        """How long the oldest open invalidation has been open; 0 if none is. That of a predecessor counts
        from the return."""
        oldest = next(iter(self._open.values()), None)  # a dict keeps the order of insertion
        return 0 if oldest is None else (monotonic_ns() - oldest.since_ns) // 1_000_000

    # ------------------------------------------------ optimistic sections

    def open_window(self, uaddrs: UaddrRange, *, is_attempt: bool = True) -> Window:
        """Start relying on `uaddrs`, none of which may be in an open invalidation."""
        window = Window(uaddrs, is_attempt=is_attempt)
        self._windows.add(window)
        return window

    def close_window(self, window: Window) -> None:
        self._windows.discard(window)
        if window.closed is not None:
            window.closed.set()

    async def outlive_what_was_learned(self) -> None:
        """Forget what was learned in windows, and block until nothing is relied on that was learned before
        the call: every window that was open then is closed, and has taught nothing."""
        self._forget_learned(EVERYTHING)  # before it waits: a window that opens meanwhile is not waited for
        for closed in [_closed(window) for window in self._windows]:
            await closed.wait()

    def mark_stale(self, uaddrs: UaddrRange) -> None:
        """Make stale every window that overlaps `uaddrs`: its attempt must start again."""
        self._call_listeners(uaddrs)
        self._forget_learned(uaddrs)
        for window in self._windows:
            if not window.stale and window.uaddrs.overlaps(uaddrs):
                window.stale = True
                self.stale_windows += window.is_attempt

    def mark_all_stale(self, ranges: Iterable[UaddrRange]) -> None:
        """`mark_stale` of many ranges, with one look at each window."""
        bounds = RangeBounds()
        for uaddrs in ranges:
            self._call_listeners(uaddrs)
            self._forget_learned(uaddrs)
            bounds.add(uaddrs)
        for window in self._windows:
            if not window.stale and bounds.touches(window.uaddrs):
                window.stale = True
                self.stale_windows += window.is_attempt

    def listen(self, listener: Callable[[UaddrRange], None]) -> None:
        """Call `listener`, in the same step, with pages about which nothing learned may be used any more:
        when they become stale, and when an open invalidation ends, which may have changed them at any time
        since its begin."""
        self._listeners.append(listener)

    def learn_in_windows(self, forget: Callable[[UaddrRange], None]) -> None:
        """Call `forget`, in the same step, with pages that become stale. For what is learned only in windows
        that teach, so that nothing of it can have changed in an open invalidation."""
        self._forget.append(forget)

    def _forget_learned(self, uaddrs: UaddrRange) -> None:
        for forget in self._forget:
            forget(uaddrs)

    def _call_listeners(self, uaddrs: UaddrRange) -> None:
        for listener in self._listeners:
            listener(uaddrs)

    def open_at(self, uaddrs: UaddrRange) -> OpenInvalidation | None:
        """An open invalidation that overlaps these pages."""
        if not self._open_bounds.touches(uaddrs):
            return None
        if self._open_index is not None:
            return next(self._open_index.overlapping(uaddrs), None)
        return next(each for each in self._open.values() if each.uaddrs.overlaps(uaddrs))

    def is_invalidating(self, uaddrs: UaddrRange) -> bool:
        """Whether any of these pages is in an invalidation that is open or not served yet."""
        batches = (self._pending, self._serving)
        return self.open_at(uaddrs) is not None or any(
            batch is not None and batch.touches(uaddrs) for batch in batches
        )

    def cut_back(self, uaddrs: UaddrRange, page: int) -> UaddrRange:
        """The largest part of `uaddrs` around `page` that is in no open invalidation, as `page` must be."""
        return self._open_bounds.gap(page, uaddrs)

    # ------------------------------------------------ the region manager's end

    def invalidation_of(self, page: int) -> Batch | None:
        """The unserved batch that invalidates `page`: a mapping of it must not be used meanwhile."""
        if not self._unserved:
            return None
        for batch in (self._pending, self._serving):
            if batch is not None and page in batch:
                return batch
        return None

    async def wait_rung(self) -> None:
        """Block until the doorbell rings for an invalidation that is not served yet."""
        await self._doorbell.receive()
        while not self._unserved:  # the task that rang has served it itself
            await self._doorbell.receive()

    async def wait_served(self) -> None:
        """Block until every invalidation announced before the call is served."""
        if self._unserved:
            last = self._serving if self._pending.empty else self._pending
            assert last is not None, "an unserved invalidation is pending or being served"
            await last.done.wait()

    def take(self) -> Batch:
        """Take the pending batch. Call it under the region lock: one pass then serves all of it."""
        self._serving, self._pending = self._pending, Batch()
        if self._journal is not None:
            self._serving.gone_count = self._journal.gone_count
        return self._serving

    def served(self, batch: Batch) -> None:
        """Nothing made from the old frames is left: wake the tasks that wait for the batch."""
        if batch.began_ns is not None:
            took = perf_counter_ns() - batch.began_ns
            self.passes.record(took)
            if self.trace is not None:
                self.trace.served(took, batch.announced)
        if self._journal is not None:
            self._journal.served(batch.gone_count)
        self._serving = None
        self._unserved = not self._pending.empty
        batch.done.set()


def _closed(window: Window) -> trio.Event:
    if window.closed is None:
        window.closed = trio.Event()
    return window.closed
