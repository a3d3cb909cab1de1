"""The event bus: which listener gets which events, and what a slow listener loses."""

from __future__ import annotations

import time

import trio
from msgspec.structs import replace
from trio.testing import wait_all_tasks_blocked

from fakes.running import Running
from intercept_protocol.events import (
    AnyFact,
    DrainStarted,
    EventsDropped,
    InterceptAnswered,
    VpAttached,
    VpDetached,
)
from interceptd.telemetry.event_bus import (
    EVENTS_KEPT,
    NO_EVENTS,
    EventBus,
    EventFilter,
    PartitionPublisher,
    Subscription,
)


def events_filter(*events: str) -> EventFilter:
    return EventFilter(frozenset(events))


ATTACHES = events_filter("vp_attached")
DRAIN = DrainStarted(timeout_ms=1, partitions=2)


def answered(vp_index: int = 0, reason: str = "mapped") -> InterceptAnswered:
    return InterceptAnswered(vp_index=vp_index, outcome="resume", reason=reason, gfn=1, access=1)


def listening(event_bus: EventBus, wanted: EventFilter, kept: int = EVENTS_KEPT) -> Subscription:
    subscription = Subscription(kept)
    event_bus.subscribe(subscription, wanted)
    return subscription


def heard(subscription: Subscription) -> list[AnyFact]:
    return [event.fact for event in subscription.take(EVENTS_KEPT)]


def test_a_listener_gets_the_events_it_subscribed_to_in_order() -> None:
    event_bus = EventBus()
    subscription = listening(event_bus, events_filter("vp_attached", "vp_detached"))

    event_bus.publish(VpAttached(vp_index=1))
    event_bus.publish(DRAIN)
    event_bus.publish(VpDetached(vp_index=1, intercepts=0))

    assert heard(subscription) == [VpAttached(vp_index=1), VpDetached(vp_index=1, intercepts=0)]


def test_events_before_the_first_listener_are_not_kept() -> None:
    event_bus = EventBus()
    event_bus.publish(VpAttached(vp_index=1))

    assert heard(listening(event_bus, ATTACHES)) == []


def test_event_is_one_object_to_all_listeners() -> None:
    event_bus = EventBus()
    first, second = listening(event_bus, ATTACHES), listening(event_bus, ATTACHES)

    event_bus.publish(VpAttached(vp_index=1))

    assert first.take(1)[0] is second.take(1)[0]


def test_a_partition_filter_passes_only_events_of_that_partition() -> None:
    event_bus = EventBus()
    subscription = listening(
        event_bus, replace(events_filter("vp_attached", "drain_started"), partition_id=2)
    )

    for partition_id in (1, 2, 3):
        PartitionPublisher(event_bus, partition_id).publish(VpAttached(vp_index=partition_id))
    event_bus.publish(DRAIN)

    assert heard(subscription) == [VpAttached(vp_index=2)]


def test_a_vp_filter_passes_only_events_of_that_vp() -> None:
    event_bus = EventBus()
    wanted = replace(events_filter("vp_attached", "intercept_answered", "drain_started"), vp_index=0)
    subscription = listening(event_bus, wanted)

    for fact in (VpAttached(vp_index=1), VpAttached(vp_index=0), answered(1), answered(0), DRAIN):
        event_bus.publish(fact)

    assert heard(subscription) == [VpAttached(vp_index=0), answered(0)]


def test_a_reason_filter_affects_only_intercepts() -> None:
    event_bus = EventBus()
    wanted = replace(events_filter("intercept_answered", "vp_attached"), reasons=frozenset({"kicked"}))
    subscription = listening(event_bus, wanted)

    for fact in (answered(), answered(reason="kicked"), VpAttached(vp_index=1)):
        event_bus.publish(fact)

    assert heard(subscription) == [answered(reason="kicked"), VpAttached(vp_index=1)]


def test_a_new_subscription_replaces_the_old_and_keeps_queued_events() -> None:
    event_bus = EventBus()
    subscription = listening(event_bus, ATTACHES)
    event_bus.publish(VpAttached(vp_index=1))

    event_bus.subscribe(subscription, events_filter("drain_started"))
    event_bus.publish(VpAttached(vp_index=2))
    event_bus.publish(DRAIN)

    assert heard(subscription) == [VpAttached(vp_index=1), DRAIN]


def test_intercepts_are_wanted_only_with_a_listener_for_them() -> None:
    event_bus = EventBus()
    wanted = [event_bus.intercepts_wanted]
    listening(event_bus, ATTACHES)
    wanted.append(event_bus.intercepts_wanted)
    subscription = listening(event_bus, events_filter("intercept_answered"))
    wanted.append(event_bus.intercepts_wanted)
    event_bus.unsubscribe(subscription)
    wanted.append(event_bus.intercepts_wanted)

    assert wanted == [False, False, True, False]


def test_a_fact_about_each_of_many_is_published_in_order_and_made_for_listeners_only() -> None:
    event_bus = EventBus()
    made: list[int] = []

    def attached(index: int) -> VpAttached:
        made.append(index)
        return VpAttached(vp_index=index)

    PartitionPublisher(event_bus, 7).publish_each(attached, [1, 2])
    assert made == []
    subscription = listening(event_bus, replace(ATTACHES, partition_id=7))
    PartitionPublisher(event_bus, 7).publish_each(attached, [3, 4])
    PartitionPublisher(event_bus, 8).publish_each(attached, [5])

    assert heard(subscription) == [VpAttached(vp_index=3), VpAttached(vp_index=4)]


def test_a_closed_listener_gets_no_more_events() -> None:
    event_bus = EventBus()
    subscription = listening(event_bus, ATTACHES)

    event_bus.subscribe(subscription, NO_EVENTS)
    event_bus.publish(VpAttached(vp_index=1))

    assert heard(subscription) == []


def test_dropped_events_are_counted_at_their_position() -> None:
    event_bus = EventBus()
    subscription = listening(event_bus, ATTACHES, kept=2)

    for vp_index in range(5):
        event_bus.publish(VpAttached(vp_index=vp_index))
    first = [event.fact for event in subscription.take(1)]
    event_bus.publish(VpAttached(vp_index=5))

    assert first == [VpAttached(vp_index=0)]
    assert heard(subscription) == [VpAttached(vp_index=1), EventsDropped(count=3), VpAttached(vp_index=5)]


def test_a_gap_at_the_end_is_reported_after_all_events_before_it() -> None:
    event_bus = EventBus()
    subscription = listening(event_bus, ATTACHES, kept=1)
    event_bus.publish(VpAttached(vp_index=0))
    event_bus.publish(VpAttached(vp_index=1))

    assert heard(subscription) == [VpAttached(vp_index=0)]
    assert heard(subscription) == [EventsDropped(count=1)]
    assert heard(subscription) == []


def test_listener_that_never_takes_keeps_a_bounded_number() -> None:
    event_bus = EventBus()
    subscription = listening(event_bus, ATTACHES)

    for vp_index in range(3 * EVENTS_KEPT):
        event_bus.publish(VpAttached(vp_index=vp_index))

    assert len(subscription.take(10 * EVENTS_KEPT)) == EVENTS_KEPT
    assert heard(subscription) == [EventsDropped(count=2 * EVENTS_KEPT)]


def test_events_outside_the_subscription_are_not_counted_as_dropped() -> None:
    event_bus = EventBus()
    subscription = listening(event_bus, ATTACHES, kept=1)

    for fact in (VpAttached(vp_index=0), DRAIN, DRAIN):
        event_bus.publish(fact)

    assert [*heard(subscription), *heard(subscription)] == [VpAttached(vp_index=0)]


def test_event_says_where_it_happened() -> None:
    event_bus = EventBus()
    subscription = listening(event_bus, events_filter("vp_attached", "drain_started"))

    PartitionPublisher(event_bus, 7).publish(VpAttached(vp_index=1))
    event_bus.publish(DRAIN)

    assert [event.partition_id for event in subscription.take(2)] == [7, None]


def test_event_says_when_it_happened_in_milliseconds_of_the_clock() -> None:
    event_bus = EventBus()
    subscription = listening(event_bus, ATTACHES)
    before = time.time_ns() // 1_000_000

    event_bus.publish(VpAttached(vp_index=1))

    (event,) = subscription.take(1)
    assert before <= event.time_ms <= time.time_ns() // 1_000_000


async def test_a_listener_waits_until_there_is_something_to_take(nursery: trio.Nursery) -> None:
    event_bus = EventBus()
    subscription = listening(event_bus, ATTACHES)
    waiting = Running(nursery, subscription.wait)
    await wait_all_tasks_blocked()
    waited = not waiting.done

    event_bus.publish(VpAttached(vp_index=1))
    await waiting.result()

    assert (waited, heard(subscription)) == (True, [VpAttached(vp_index=1)])


async def test_a_listener_is_drained_when_it_asks_again_after_the_last_event(nursery: trio.Nursery) -> None:
    event_bus = EventBus()
    subscription = listening(event_bus, ATTACHES)
    event_bus.publish(VpAttached(vp_index=1))
    telling = Running(nursery, event_bus.wait_drained)
    await wait_all_tasks_blocked()
    before = telling.done
    heard(subscription)
    await wait_all_tasks_blocked()
    taken = telling.done

    nursery.start_soon(subscription.wait)
    await telling.result()

    assert (before, taken) == (False, False)
    nursery.cancel_scope.cancel()
