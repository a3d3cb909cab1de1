"""What happens in the daemon, told to whoever listens.

Owns the subscriptions and what waits in each: bounded, and what does not fit is counted. To publish is one
synchronous step: it waits for nobody, and while nobody listens it is one look. Must not know who listens, nor
how an event travels.
"""

from __future__ import annotations

import time
from collections import deque
from typing import Protocol

import msgspec
import trio

from intercept_protocol.events import AnyFact, Event, EventName, EventsDropped, InterceptAnswered

EVENTS_KEPT = 1024
"""Events that wait for one listener; some 300 KiB. The same event is one object to all of them."""


class Interest(msgspec.Struct, frozen=True):
    """What a listener wants to hear of: the events named, narrowed by each other field that says anything."""

    events: frozenset[str]
    partition_id: int | None = None
    vp_index: int | None = None
    reasons: frozenset[str] = frozenset()

    @property
    def in_intercepts(self) -> bool:
        return EventName.INTERCEPT_ANSWERED in self.events

    def admits(self, event: Event) -> bool:
        fact = event.fact
        return (
            fact.event_name in self.events
            and self.partition_id in (None, event.partition_id)
            and (self.vp_index is None or self.vp_index == getattr(fact, "vp_index", None))
            and (not self.reasons or not isinstance(fact, InterceptAnswered) or fact.reason in self.reasons)
        )


NOTHING = Interest(frozenset())


class Subscription:
    """The events that one listener has still to hear, oldest first."""

    def __init__(self, kept: int = EVENTS_KEPT) -> None:
        self.interest = NOTHING
        self._kept = kept
        self._events: deque[Event] = deque()
        self._dropped = 0
        self._rung = trio.Event()
        self._told = trio.Event()

    def offer(self, event: Event) -> None:
        """Keep an event if it is wanted and there is room; the gap is told where it is."""
        if not self.interest.admits(event):
            return
        if len(self._events) >= self._kept:
            self._dropped += 1
            return
        self._note_dropped(event.time_ms)
        self._events.append(event)
        self._rung.set()

    async def wait(self) -> None:
        """Block until there is something to take. To ask again says that what was taken is told."""
        if not self._events:
            self._rung = trio.Event()
            self._told.set()
            await self._rung.wait()
            self._told = trio.Event()

    def take(self, most: int) -> list[Event]:
        """Remove and return up to `most` events."""
        taken = [self._events.popleft() for _ in range(min(most, len(self._events)))]
        if not self._events:
            self._note_dropped(_now_ms())
        return taken

    async def wait_drained(self) -> None:
        """Block until the listener has heard all."""
        while self._events or not self._told.is_set():
            await self._told.wait()
            await trio.lowlevel.checkpoint()

    def _note_dropped(self, time_ms: int) -> None:
        if self._dropped:
            self._events.append(Event(time_ms, EventsDropped(count=self._dropped)))
            self._dropped = 0


class Publisher(Protocol):
    """What whoever has a fact to tell sees of a event_bus."""

    def publish(self, fact: AnyFact, /) -> None: ...


class EventBus:
    """The daemon's one event_bus. `intercepts_wanted` is what the hot path looks at."""

    def __init__(self) -> None:
        self.intercepts_wanted = False
        self._subscriptions: dict[Subscription, None] = {}

    def publish(self, fact: AnyFact, /, partition_id: int | None = None) -> None:
        if self._subscriptions:
            event = Event(_now_ms(), fact, partition_id)
            for subscription in self._subscriptions:
                subscription.offer(event)

    def listen(self, subscription: Subscription, interest: Interest) -> None:
        """From now on, and instead of what it was before, `interest` is what this one listens for."""
        subscription.interest = interest
        if interest.events:
            self._subscriptions[subscription] = None
        else:
            self._subscriptions.pop(subscription, None)
        self.intercepts_wanted = any(held.interest.in_intercepts for held in self._subscriptions)

    def leave(self, subscription: Subscription) -> None:
        self.listen(subscription, NOTHING)

    async def wait_drained(self) -> None:
        """Block until every listener has heard all that was published before."""
        for subscription in list(self._subscriptions):
            await subscription.wait_drained()


class PartitionEventBus:
    """A partition's view of the event_bus: whatever it publishes happened there."""

    __slots__ = ("_event_bus", "_partition_id")

    def __init__(self, event_bus: EventBus, partition_id: int) -> None:
        self._event_bus = event_bus
        self._partition_id = partition_id

    @property
    def intercepts_wanted(self) -> bool:
        return self._event_bus.intercepts_wanted

    def publish(self, fact: AnyFact, /) -> None:
        self._event_bus.publish(fact, self._partition_id)


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
