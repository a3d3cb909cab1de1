"""The events that a daemon on real sockets sends to a subscriber, and that a slow one blocks no other."""

from __future__ import annotations

import errno
from collections.abc import Mapping
from itertools import count

import pytest
import trio.testing

from fakes.raw_peer import RawPeer
from fakes.served import Served, serving
from intercept_protocol import rpc
from intercept_protocol.errors import WireError
from intercept_protocol.events import EVENTS_DROPPED, EventName
from intercept_protocol.outcomes import Access, Answer
from interceptd.sessions.event_stream import EVENTS_A_TURN
from interceptd.telemetry.event_bus import EVENTS_KEPT

BAR = {"start_gfn": 0x100, "page_count": 16, "start_uaddr": 0x9000000}
RANGE = {"start_uaddr": 0x9000000, "page_count": 16}
PATIENCE = 30.0
"""Seconds after which an end has not come."""
EVERYTHING = [name.value for name in EventName]


async def next_event(peer: RawPeer) -> Mapping[str, object]:
    """The next notification, without its time and partition."""
    message = await peer.receive()
    assert isinstance(message, rpc.Notification), message
    (fields,) = message.params
    assert isinstance(fields, dict)
    assert fields.pop("time_ms") > 1_700_000_000_000
    fields.pop("partition_id", None)
    return fields


async def next_events(peer: RawPeer, number: int) -> list[Mapping[str, object]]:
    return [await next_event(peer) for _ in range(number)]


async def subscribed(served: Served, *events: str, **narrowed: object) -> RawPeer:
    peer = await served.operator()
    await peer.ask("subscribe", events=list(events), **narrowed)
    return peer


async def test_events_of_a_partitions_life_are_sent() -> None:
    async with serving() as served:
        operator = await subscribed(served, *EVERYTHING)

        guest = await served.guest()
        vp = await served.vp(guest, 3)
        await vp.intercept(0x100)
        vp.close()
        detached = await next_events(operator, 4)
        guest.vmm.close()

        assert [event["event"] for event in detached] == [
            "partition_created",
            "vp_attached",
            "intercept_answered",
            "vp_detached",
        ]
        assert detached[0].items() >= {"address_space": "declared", "hypervisor": "software"}.items()
        assert detached[3] == {"event": "vp_detached", "vp_index": 3, "intercepts": 1}
        assert await next_event(operator) == {"event": "partition_ended", "intercepts": 1}


async def test_region_and_invalidation_events_have_their_source() -> None:
    async with serving() as served:
        guest = await served.guest()
        operator = await subscribed(served, *EVERYTHING)

        await served.mmio(guest)
        notifier = await served.notifier(guest)
        await notifier.ask("invalidate_begin", start_uaddr=0x9000000, length=0x10000)
        await notifier.ask("invalidate_end", start_uaddr=0x9000000, length=0x10000)
        await notifier.ask("invalidate", start_uaddr=0x9000000, length=0x10000)
        await guest.vmm.ask("unmap_vma", start_uaddr=0x9000000, page_count=16)
        await guest.vmm.ask("remove_region", **BAR)

        assert await next_events(operator, 7) == [
            {"event": "region_added", **BAR, "kind": "mmio", "writable": True, "executable": False},
            {"event": "invalidation_begun", "source": "notifier", **RANGE},
            {"event": "invalidation_ended", "source": "notifier", **RANGE},
            {"event": "range_invalidated", "source": "notifier", **RANGE},
            {"event": "invalidation_begun", "source": "unmap_vma", **RANGE},
            {"event": "invalidation_ended", "source": "unmap_vma", **RANGE},
            {"event": "region_removed", **BAR},
        ]


async def test_a_dangling_pinned_region_is_reported() -> None:
    async with serving() as served:
        guest = await served.guest()
        await guest.vmm.ask(
            "map_vma", start_uaddr=0x9000000, page_count=16, start_pfn=1,
            readable=True, writable=True, executable=False, io=False,
        )  # fmt: skip
        await guest.vmm.ask("add_region", **BAR, kind="pinned", writable=True, executable=False)
        operator = await subscribed(served, "pinned_region_dangling")

        await guest.vmm.ask("unmap_vma", start_uaddr=0x9001000, page_count=1)

        assert await next_event(operator) == {"event": "pinned_region_dangling", **BAR}


async def test_intercept_events_have_the_answers_given() -> None:
    async with serving() as served:
        guest = await served.guest()
        await served.mmio(guest)
        vp = await served.vp(guest, 5)
        operator = await subscribed(served, "intercept_answered")

        assert await vp.intercept(0x103, Access.WRITE) is Answer.MAPPED
        assert await vp.intercept(0x999) is Answer.NO_REGION
        await vp.ask_raw_intercept(bytes(256))

        head = {"event": "intercept_answered", "vp_index": 5}
        assert await next_events(operator, 3) == [
            head | {"outcome": "resume", "reason": "mapped", "gfn": 0x103, "access": 2},
            head | {"outcome": "forward", "reason": "no_region", "gfn": 0x999, "access": 1},
            head | {"outcome": "forward", "reason": "not_memory"},
        ]


async def test_filters_of_partition_vp_and_reason_come_together() -> None:
    async with serving() as served:
        ours, theirs = await served.guest(), await served.guest()
        vps = [await served.vp(guest, index) for guest in (ours, theirs) for index in (0, 1)]
        operator = await subscribed(
            served,
            "intercept_answered",
            partition_id=theirs.partition_id,
            vp_index=1,
            reasons=["no_region"],
        )

        for number, vp in enumerate(vps):
            await vp.intercept(number)
            await vp.ask_raw_intercept(bytes(256))
        await vps[3].intercept(0x77)

        assert [event["gfn"] for event in await next_events(operator, 2)] == [3, 0x77]


async def test_policy_set_is_sent_for_vmm_and_operator() -> None:
    async with serving() as served:
        guest = await served.guest()
        operator = await subscribed(served, "policy_set")

        await guest.vmm.ask("set_policy", mmio_granularity="page")
        await guest.vmm.ask("set_policy")
        other = await served.operator()
        await other.ask("set_policy", partition_id=guest.partition_id, mmio_granularity="vma")

        assert await next_events(operator, 2) == [
            {"event": "policy_set", "mmio_granularity": "page"},
            {"event": "policy_set", "mmio_granularity": "vma"},
        ]


async def test_refusals_are_sent_with_their_peer() -> None:
    async with serving() as served:
        operator = await subscribed(served, "hello_refused", "connection_refused")

        with pytest.raises(WireError):
            await served.hello("vp", partition_id=9, vp_index=0, token=bytes(16))
        rude = await served.connect()
        await rude.send(b"GET / HTTP/1.1\r\n" + b"x" * 1000)

        refused, closed = await next_events(operator, 2)
        assert (refused["event"], closed["event"]) == ("hello_refused", "connection_refused")
        assert str(refused["error"]).startswith("EACCES: no such partition")
        assert str(closed["error"]).startswith("EBADMSG: ")
        assert {"uid", "pid"} <= refused.keys() & closed.keys()


async def test_all_events_of_a_drain_are_sent_before_the_connection_closes() -> None:
    async with serving() as served:
        await served.guest()
        operator = await subscribed(served, "drain_started", "partition_ended")

        served.daemon.drain(1.5)

        assert await next_events(operator, 2) == [
            {"event": "drain_started", "timeout_ms": 1500, "partitions": 1},
            {"event": "partition_ended", "intercepts": 0},
        ]
        assert await operator.receive() is None
        await served.ended.wait()


async def test_last_events_beyond_one_batch_are_all_sent() -> None:
    regions = 3 * EVENTS_A_TURN
    async with serving() as served:
        guest = await served.guest()
        for number in range(regions):
            await guest.vmm.ask(
                "add_region", start_gfn=number, page_count=1, start_uaddr=number << 12,
                kind="mmio", writable=True, executable=False,
            )  # fmt: skip
        operator = await subscribed(served, "region_removed", "partition_ended")

        served.daemon.drain(1.5)

        told = await next_events(operator, regions + 1)
        assert [event["event"] for event in told] == ["region_removed"] * regions + ["partition_ended"]


async def test_subscriber_that_does_not_read_does_not_hold_up_the_end() -> None:
    async with serving() as served:
        await subscribed(served, "intercept_answered", "drain_started")
        await flood(served, 5 * EVENTS_KEPT)

        served.daemon.drain(1.5)

        with trio.move_on_after(PATIENCE):
            await served.ended.wait()
        assert served.ended.is_set()


async def test_a_subscriber_that_does_not_read_learns_how_much_it_missed() -> None:
    published = 5 * EVENTS_KEPT
    async with serving() as served:
        operator = await subscribed(served, "intercept_answered")

        await flood(served, published)

        told = dropped = 0
        while told + dropped < published:
            event = await next_event(operator)
            if event["event"] == EVENTS_DROPPED:
                dropped += int(str(event["count"]))
            else:
                told += 1
        assert dropped > 0
        assert told >= EVENTS_KEPT
        assert told + dropped == published


async def flood(served: Served, number: int) -> None:
    """Intercepts, all of them answered."""
    vp = await served.vp(await served.guest())
    for _ in range(number):
        await vp.intercept(0x999)


async def test_requests_continue_between_the_events() -> None:
    async with serving() as served:
        operator = await subscribed(served, "vp_attached")
        guest = await served.guest()
        indices = count()

        for _ in range(20):
            await served.vp(guest, next(indices))
        msgid = await operator.request("inspect_partition", {"partition_id": guest.partition_id})

        messages = [await operator.receive() for _ in range(21)]
        (response,) = [message for message in messages if isinstance(message, rpc.Response)]
        assert (response.msgid, response.error) == (msgid, None)
        assert sum(isinstance(message, rpc.Notification) for message in messages) == 20


async def test_answer_never_lands_within_an_event_that_is_half_sent() -> None:
    async with serving() as served:
        operator = await subscribed(served, "intercept_answered")
        await flood(served, 5 * EVENTS_KEPT)  # the stream is stuck in the middle of a send

        msgid = await operator.request("subscribe", {"events": []})
        await trio.testing.wait_all_tasks_blocked()
        while isinstance(message := await operator.receive(), rpc.Notification):
            pass

        assert message == rpc.Response(msgid, None, None)


async def test_subscribing_to_nothing_ends_the_events() -> None:
    async with serving() as served:
        guest = await served.guest()
        operator = await subscribed(served, "policy_set")

        await operator.ask("subscribe", events=[])
        await guest.vmm.ask("set_policy", mmio_granularity="page")

        assert await operator.ask("list_partitions")


async def test_operator_that_left_is_forgotten_by_the_event_bus() -> None:
    async with serving() as served:
        operator = await subscribed(served, "intercept_answered")
        assert served.daemon.event_bus.intercepts_wanted

        operator.close()
        other = await served.operator()
        while (await served.daemon.daemon_statistics()).connections > 1:
            await other.ask("statistics")

        assert not served.daemon.event_bus.intercepts_wanted


async def test_partition_lost_has_a_bounded_size() -> None:
    async with serving() as served:
        vmm = await served.hello("vmm")
        created = await vmm.ask("create_partition", address_space="declared", hypervisor="vmm")
        assert isinstance(created, dict)
        joined = {"partition_id": created["partition_id"], "token": created["token"]}
        link = await served.hello("hypervisor", **joined)
        operator = await subscribed(served, "partition_lost", "partition_ended")
        await vmm.request("add_region", {**BAR, "kind": "movable", "writable": True, "executable": False})
        asked = await link.receive()
        assert isinstance(asked, rpc.Request)
        await link.send(rpc.encode_result(asked.msgid, None))
        await vmm.response()
        await vmm.request("remove_region", dict(BAR))
        asked = await link.receive()
        assert isinstance(asked, rpc.Request)

        await link.send(rpc.encode_error(asked.msgid, WireError(errno.EIO, "no " * 15_000)))

        lost, ended = await next_events(operator, 2)
        assert (lost["event"], ended["event"]) == ("partition_lost", "partition_ended")
        assert 0 < len(str(lost["error"])) <= 200
