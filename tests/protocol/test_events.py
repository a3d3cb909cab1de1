"""Events on the wire, including unknown ones of a later version."""

from __future__ import annotations

import errno
from typing import get_args

import pytest

from intercept_protocol.errors import ProtocolViolation
from intercept_protocol.events import (
    EVENTS_DROPPED,
    AnyFact,
    Event,
    EventName,
    EventsDropped,
    InterceptAnswered,
    Reason,
    VpAttached,
    decode_event,
)
from intercept_protocol.outcomes import Answer


def test_every_event_name_has_a_fact_and_every_fact_a_name() -> None:
    tags = [fact.__struct_config__.tag for fact in get_args(AnyFact)]

    assert tags == [*EventName, EVENTS_DROPPED]


def test_filterable_reasons_are_those_of_the_answers() -> None:
    assert list(Reason) == [answer.reason for answer in Answer]


def test_fields_that_are_none_do_not_travel() -> None:
    fact = InterceptAnswered(vp_index=0, outcome="forward", reason="not_memory")

    assert Event(1, fact).to_fields() == {
        "event": "intercept_answered",
        "time_ms": 1,
        "vp_index": 0,
        "outcome": "forward",
        "reason": "not_memory",
    }


def test_event_of_a_later_version_is_ignored() -> None:
    assert decode_event([{"event": "moon_rose", "time_ms": 1, "phase": "full"}]) is None


def test_field_of_a_later_version_is_ignored() -> None:
    event = decode_event([{"event": "vp_attached", "time_ms": 1, "partition_id": 2, "vp_index": 3, "x": 4}])

    assert event == Event(1, VpAttached(vp_index=3), 2)


def test_a_source_of_a_later_version_is_accepted() -> None:
    fields = {"event": "range_invalidated", "time_ms": 1, "source": "fuse", "start_uaddr": 0, "page_count": 1}

    event = decode_event([fields])

    assert event is not None
    assert event.to_fields() == fields


@pytest.mark.parametrize(
    "params",
    [
        [],
        [None],
        [{}],
        [{"event": "vp_attached"}],
        [{"event": "vp_attached", "time_ms": "now", "vp_index": 1}],
        [{"event": "vp_attached", "time_ms": 1}],
        [{"event": "vp_attached", "time_ms": 1, "vp_index": 1, "partition_id": "one"}],
        [{"event": EVENTS_DROPPED, "time_ms": 1, "count": "many"}],
        [{"event": "x" * 60_000, "time_ms": None}],
    ],
    ids=lambda params: repr(params)[:60],
)
def test_an_invalid_event_is_eproto_and_quoted_in_part(params: list[object]) -> None:
    with pytest.raises(ProtocolViolation) as caught:
        decode_event(params)

    assert caught.value.number == errno.EPROTO
    assert len(caught.value.message) < 400


def test_gap_is_an_event_of_no_partition() -> None:
    event = Event(7, EventsDropped(count=3))

    assert decode_event([event.to_fields()]) == event
