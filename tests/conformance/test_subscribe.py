"""`subscribe` of an operator, and the events that follow."""

from __future__ import annotations

from typing import Any

import pytest

from conformance.conftest import Server
from conformance.guests import GFN, PAGES, UADDR, WHOLE_MEMORY, RawVmm
from conformance.statements import needs, statement
from conformance.wire import RawConnection, Refused, events_until, next_event, request

EVENTS_KEPT = 1024
WHOLE = {"start_uaddr": UADDR, "page_count": PAGES}
BAR = {"start_gfn": GFN, "page_count": PAGES, "start_uaddr": UADDR}


def subscribe(operator: RawConnection, *events: str, **narrowed: object) -> None:
    assert operator.ask("subscribe", {"events": list(events), **narrowed}) is None


def has(event: dict[str, Any], **fields: object) -> bool:
    """Whether the event has these fields: a later version may add some."""
    return event.items() >= fields.items()


@statement("O-6", "O-11")
@needs("notifier")
def test_the_events_of_a_partition_come_in_order(server: Server, operator: RawConnection) -> None:
    subscribe(
        operator, "partition_created", "vp_attached", "region_added", "invalidation_begun",
        "invalidation_ended", "range_invalidated", "region_removed", "policy_set", "vp_detached",
        "partition_ended",
    )  # fmt: skip
    with RawVmm(server.socket) as vmm:
        vmm.add_memory()
        vp, notifier = vmm.vp(3), vmm.notifier()
        vp.intercept(GFN)
        notifier.ask("invalidate_begin", WHOLE_MEMORY)
        notifier.ask("invalidate_end", WHOLE_MEMORY)
        notifier.ask("invalidate", WHOLE_MEMORY)
        vmm.ask("set_policy", mmio_granularity="page")
        vmm.ask("remove_region", **BAR)
        vp.half_close()
        vp.receive_all()
    heard = [
        each for each in events_until(operator, "partition_ended") if each["partition_id"] == vmm.partition_id
    ]
    assert [each["event"] for each in heard] == [
        "partition_created",
        "region_added",
        "vp_attached",
        "invalidation_begun",
        "invalidation_ended",
        "range_invalidated",
        "policy_set",
        "region_removed",
        "vp_detached",
        "partition_ended",
    ]
    created, added, attached, begun, ended, invalidated, policy, removed, detached, over = heard
    assert has(created, address_space="declared", hypervisor="software", name="")
    assert has(added, **BAR, kind="movable", writable=True, executable=False)
    assert (attached["vp_index"], detached["vp_index"], detached["intercepts"]) == (3, 3, 1)
    assert all(has(each, **WHOLE, source="notifier") for each in (begun, ended, invalidated))
    assert (policy["mmio_granularity"], over["intercepts"]) == ("page", 1)
    assert has(removed, **BAR)


@statement("O-6")
def test_an_answered_intercept_is_an_event_with_its_answer_page_and_access(
    operator: RawConnection, vmm: RawVmm
) -> None:
    subscribe(operator, "intercept_answered", partition_id=vmm.partition_id)
    vp = vmm.vp(5)
    vp.intercept(GFN, 1)
    vp.ask("intercept", bytes(256))
    no_region, not_memory = next_event(operator), next_event(operator)
    assert has(no_region, vp_index=5, outcome="forward", reason="no_region", gfn=GFN, access=2)
    assert has(not_memory, vp_index=5, outcome="forward", reason="not_memory")
    assert not_memory.keys().isdisjoint({"gfn", "access"})


@statement("O-6")
def test_events_that_were_not_selected_are_not_sent(
    server: Server, operator: RawConnection, vmm: RawVmm
) -> None:
    """Other partition, VP, reason or event: one event of five remains."""
    vmm.add_memory()
    first, second = vmm.vp(1), vmm.vp(2)
    with RawVmm(server.socket) as other:
        subscribe(
            operator, "intercept_answered",
            partition_id=vmm.partition_id, vp_index=2, reasons=["no_region"],
        )  # fmt: skip
        other.vp(2).intercept(0)
    first.intercept(0)
    vmm.ask("set_policy", mmio_granularity="page")
    second.intercept(GFN)
    second.intercept(7)
    assert next_event(operator)["gfn"] == 7


@statement("O-6")
def test_a_partition_that_does_not_exist_may_be_named(operator: RawConnection) -> None:
    wanted = {"events": ["intercept_answered"], "partition_id": 2**63}
    assert operator.ask("subscribe", wanted) is None


@statement("O-6")
def test_a_later_subscribe_takes_the_place_of_an_earlier_one(operator: RawConnection, vmm: RawVmm) -> None:
    subscribe(operator, "policy_set", partition_id=vmm.partition_id)
    subscribe(operator, "vp_attached", partition_id=vmm.partition_id)
    vmm.ask("set_policy", mmio_granularity="page")
    vmm.vp(4)
    assert next_event(operator)["event"] == "vp_attached"


@statement("O-6")
def test_a_subscribe_to_nothing_ends_it(operator: RawConnection, vmm: RawVmm) -> None:
    subscribe(operator, "policy_set", partition_id=vmm.partition_id)
    subscribe(operator)
    vmm.ask("set_policy", mmio_granularity="page")
    operator.ask("statistics")
    assert not operator.is_readable()


@statement("O-6", "E-2", "P-3")
@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({}, "events"),
        ({"events": "policy_set"}, "events"),
        ({"events": ["weather"]}, "events"),
        ({"events": [], "vp_index": -1}, "vp_index"),
        ({"events": [], "reasons": ["because"]}, "reasons"),
    ],
)
def test_a_wrong_field_is_einval_that_names_it(
    operator: RawConnection, fields: dict[str, object], field: str
) -> None:
    refusal = operator.refusal("subscribe", fields)
    assert (refusal.name, str(refusal.details.get("field")).split("[")[0]) == ("EINVAL", field)


@statement("O-10", "T-19")
def test_requests_continue_between_events(operator: RawConnection, vmm: RawVmm) -> None:
    subscribe(operator, "intercept_answered", partition_id=vmm.partition_id)
    vp = vmm.vp()
    for gfn in range(20):
        vp.intercept(gfn)
    operator.send(request("statistics", msgid=9))
    received = [operator.receive() for _ in range(21)]
    ((_, msgid, error, statistics),) = [each for each in received if each[0] == 1]
    assert (msgid, error, statistics["partitions"] >= 1) == (9, None, True)
    assert [each[2][0]["gfn"] for each in received if each[0] == 2] == list(range(20))


@statement("O-11")
def test_the_error_of_a_refused_hello_is_cut_at_200_characters(
    server: Server, operator: RawConnection
) -> None:
    subscribe(operator, "hello_refused")
    with RawConnection(server.socket) as connection, pytest.raises(Refused):
        connection.say_hello("x" * 1000)
    event = next_event(operator)
    assert len(event["error"]) <= 200
    assert (type(event["uid"]), type(event["pid"])) == (int, int)


@statement("O-12")
def test_a_subscriber_that_does_not_read_delays_no_one_and_learns_how_much_it_missed(
    operator: RawConnection, vmm: RawVmm
) -> None:
    subscribe(operator, "intercept_answered", partition_id=vmm.partition_id)
    vp, answered = vmm.vp(), 6 * EVENTS_KEPT
    assert all(vp.intercept(0) == ["forward", "no_region"] for _ in range(answered))
    told = dropped = 0
    while told + dropped < answered:
        event = next_event(operator)
        if event["event"] == "events_dropped":
            dropped += event["count"]
        else:
            told += 1
    assert (told + dropped, dropped > 0, told >= EVENTS_KEPT) == (answered, True, True)
