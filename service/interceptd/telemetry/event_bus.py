"""Publishes what happens in the daemon to its subscribers.

Owns the subscriptions and the bounded queue of each; events that do not fit are counted. Publishing is one
synchronous step that never waits, and without subscribers it is one check. Must not know who subscribes, nor
how an event is sent.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import Protocol, TypeVar

import msgspec
import trio

from intercept_protocol.events import AnyFact, Event, EventName, EventsDropped, InterceptAnswered
from interceptd.telemetry.trace import Trace

Item = TypeVar("Item")
EVENTS_KEPT = 1024
"""Events queued per subscription, some 300 KiB. All subscriptions share one object per event."""


class EventFilter(msgspec.Struct, frozen=True):
    """Which events a subscriber wants: those named in `events`, narrowed by every other field that is set."""

    events: frozenset[str]
    partition_id: int | None = None
    vp_index: int | None = None
    reasons: frozenset[str] = frozenset()

    @property
    def wants_intercepts(self) -> bool:
        return EventName.INTERCEPT_ANSWERED in self.events

    def matches(self, event: Event) -> bool:
        fact = event.fact
        return (
            fact.event_name in self.events
            and self.partition_id in (None, event.partition_id)
            and (self.vp_index is None or self.vp_index == getattr(fact, "vp_index", None))
            and (not self.reasons or not isinstance(fact, InterceptAnswered) or fact.reason in self.reasons)
        )


NO_EVENTS = EventFilter(frozenset())


class Subscription:
    """The queue of one subscriber, oldest event first."""

    def __init__(self, kept: int = EVENTS_KEPT) -> None:
        self.filter = NO_EVENTS
        self._kept = kept
        self._events: deque[Event] = deque()
        self._dropped = 0
        self._available = trio.Event()
        self._acknowledged = trio.Event()

    def offer(self, event: Event) -> None:
        """Queue an event that is wanted and fits. An `EventsDropped` marks each gap at its position."""
        if not self.filter.matches(event):
            return
        if len(self._events) >= self._kept:
            self._dropped += 1
            return
        self._note_dropped(event.time_ms)
        self._events.append(event)
        self._available.set()

    async def wait(self) -> None:
        """Block until an event is queued. A repeated call acknowledges that everything taken was sent."""
        if not self._events:
            self._available = trio.Event()
            self._acknowledged.set()
            await self._available.wait()
            self._acknowledged = trio.Event()

    def take(self, limit: int) -> list[Event]:
        """Remove and return up to `limit` events."""
        taken = [self._events.popleft() for _ in range(min(limit, len(self._events)))]
        if not self._events:
            self._note_dropped(_now_ms())
        return taken

    async def wait_drained(self) -> None:
        """Block until the subscriber has acknowledged every event."""
        while self._events or not self._acknowledged.is_set():
            await self._acknowledged.wait()
            await trio.lowlevel.checkpoint()

    def _note_dropped(self, time_ms: int) -> None:
        if self._dropped:
            self._events.append(Event(time_ms, EventsDropped(count=self._dropped)))
            self._dropped = 0


class Publisher(Protocol):
    """The side of an event bus that publishes."""

    def publish(self, fact: AnyFact, /) -> None: ...
    def publish_each(self, fact_of: Callable[[Item], AnyFact], items: Iterable[Item], /) -> None: ...


class EventBus:
    """The daemon's only event bus. The hot path checks `intercepts_wanted`."""

    def __init__(self) -> None:
        self.intercepts_wanted = False
        self._subscriptions: dict[Subscription, None] = {}

    def publish(self, fact: AnyFact, /, partition_id: int | None = None) -> None:
        if self._subscriptions:
            event = Event(_now_ms(), fact, partition_id)
            for subscription in self._subscriptions:
                subscription.offer(event)

    def publish_each(
        self, fact_of: Callable[[Item], AnyFact], items: Iterable[Item], /, partition_id: int | None = None
    ) -> None:
        """Publish a fact about each item. None is made while nobody subscribes."""
        if self._subscriptions:
            for item in items:
                self.publish(fact_of(item), partition_id)

    def subscribe(self, subscription: Subscription, wanted: EventFilter) -> None:
        """Set what a subscription receives from now on, in place of its earlier filter."""
        subscription.filter = wanted
        if wanted.events:
            self._subscriptions[subscription] = None
        else:
            self._subscriptions.pop(subscription, None)
        self.intercepts_wanted = any(held.filter.wants_intercepts for held in self._subscriptions)

    def unsubscribe(self, subscription: Subscription) -> None:
        self.subscribe(subscription, NO_EVENTS)

    async def wait_drained(self) -> None:
        """Block until every subscriber has acknowledged all events published before the call."""
        for subscription in list(self._subscriptions):
            await subscription.wait_drained()


class PartitionPublisher:
    """A partition's view of the event bus, and its trace: whatever it publishes happened there."""

    __slots__ = ("_event_bus", "_partition_id", "trace")

    def __init__(self, event_bus: EventBus, partition_id: int) -> None:
        self._event_bus = event_bus
        self._partition_id = partition_id
        self.trace: Trace | None = None

    @property
    def intercepts_wanted(self) -> bool:
        """Whether a subscriber or the trace wants them."""
        return self._event_bus.intercepts_wanted or self.trace is not None

    @property
    def subscribers_want_intercepts(self) -> bool:
        return self._event_bus.intercepts_wanted

    def publish(self, fact: AnyFact, /) -> None:
        self._event_bus.publish(fact, self._partition_id)
        if self.trace is not None:
            self.trace.fact(fact)

    def publish_each(self, fact_of: Callable[[Item], AnyFact], items: Iterable[Item], /) -> None:
        self._event_bus.publish_each(fact_of, items, self._partition_id)


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
