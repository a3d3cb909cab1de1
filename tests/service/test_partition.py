"""The lifetime of a partition: the order of its end, and that its failures affect no other."""

from __future__ import annotations

import errno
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial

import pytest
import trio
from structlog.testing import capture_logs
from trio.testing import wait_all_tasks_blocked

from explorer.pauses import Point
from fakes.model_partition import TIMEOUT, ModelPartition
from fakes.model_vp import attached_vp
from fakes.one_region import GFN, PAGE, PAGES, with_region
from fakes.raw_peer import RawPeer
from fakes.running import Running
from fakes.served import serving
from intercept_protocol import rpc
from intercept_protocol.addresses import PAGE_SHIFT, GfnRange
from intercept_protocol.errors import WireError
from intercept_protocol.messages import NOTIFIER_METHODS
from intercept_protocol.outcomes import Answer
from interceptd.config.schema import Limits, Timeouts
from interceptd.connections.connection import Connection
from interceptd.connections.hangup_watch import HangupWatch
from interceptd.connections.peer import Peer
from interceptd.connections.request_loop import CallsInFlight, serve_calls
from interceptd.connections.tenants import Tenants
from interceptd.errors import PartitionLost
from interceptd.hypervisor import HypervisorError
from interceptd.hypervisor.remote import RemoteHypervisor
from interceptd.partition.partition import LAST_ANSWERS_SECONDS
from interceptd.sessions.notifier import NotifierSession
from interceptd.sessions.vmm import kick


def attached_notifier(model: ModelPartition) -> RawPeer:
    """The VMM's end of a notifier connection of the partition."""
    ours, theirs = socket.socketpair()
    connection, session = (
        Connection(ours, Tenants(Limits), HangupWatch()),
        NotifierSession(model.notifier, model.regions, partial(kick, model.partition)),
    )
    announcements = model.partition.announcements
    serve = partial(serve_calls, connection, NOTIFIER_METHODS, session.answer, in_flight=announcements)
    model.partition.start_notifier(connection, b"", serve, session.close)
    return RawPeer.of(theirs)


async def living(nursery: trio.Nursery) -> tuple[ModelPartition, Running[None]]:
    """A partition that runs until it is ended, and its run."""
    model = ModelPartition()
    life = Running(nursery, model.partition.run, trio.sleep_forever)
    await wait_all_tasks_blocked()
    return model, life


# ------------------------------------------------ the end


async def test_i6_after_the_end_the_slat_is_empty_and_the_partition_admits_no_peer(
    nursery: trio.Nursery,
) -> None:
    model, life = await living(nursery)
    await with_region(model)
    await model.fault(GFN)
    admitted = model.partition.admits(model.partition.token, model.partition.owner)
    model.partition.end()
    await life.result()
    assert model.hypervisor.counters().slat_extents == 0
    assert (admitted, model.partition.admits(model.partition.token, model.partition.owner)) == (True, False)


async def test_the_end_serves_pending_invalidations_so_no_caller_waits_in_vain(nursery: trio.Nursery) -> None:
    model, life = await living(nursery)
    await with_region(model)
    await model.fault(GFN)
    unmapping = model.gates.hold(Point.UNMAP)
    invalidate = Running(nursery, model.invalidate, PAGE, PAGES)
    await unmapping.wait_reached()
    model.partition.end()
    await wait_all_tasks_blocked()
    unmapping.open()
    await invalidate.result()
    await life.result()
    assert model.hypervisor.counters().slat_extents == 0


async def test_the_end_leaves_no_invalidation_that_it_served_without_its_acknowledgement(
    nursery: trio.Nursery,
) -> None:
    model, life = await living(nursery)
    await with_region(model)
    await model.fault(GFN)
    notifier = attached_notifier(model)
    unmapping = model.gates.hold(Point.UNMAP)
    acknowledged = Running(
        nursery, notifier.ask, "invalidate", start_uaddr=PAGE << PAGE_SHIFT, length=1 << PAGE_SHIFT
    )
    await unmapping.wait_reached()
    model.partition.end()
    await wait_all_tasks_blocked()
    unmapping.open()
    assert await acknowledged.result() is None
    await life.result()
    notifier.close()


async def test_a_notifier_that_does_not_read_its_acknowledgement_does_not_block_the_end(
    nursery: trio.Nursery,
) -> None:
    model, life = await living(nursery)
    started = trio.current_time()
    with model.partition.announcements.one():
        model.partition.end()
        await life.result()
    assert trio.current_time() - started <= TIMEOUT


async def test_calls_in_flight_are_waited_for_until_they_are_answered(nursery: trio.Nursery) -> None:
    calls = CallsInFlight()
    with calls.one():
        waiting = Running(nursery, calls.wait_answered)
        await wait_all_tasks_blocked()
        assert not waiting.done
    await waiting.result()


async def test_the_partition_ends_after_a_vmm_failure_which_propagates() -> None:
    model = ModelPartition()

    async def fail() -> None:
        await with_region(model)
        await model.fault(GFN)
        raise WireError(errno.EPROTO, "a mistake")

    with pytest.raises(WireError, match="a mistake"):
        await model.partition.run(fail)
    assert model.hypervisor.counters().slat_extents == 0
    assert not model.partition.lost


async def test_the_end_waits_for_a_vp_no_longer_than_its_timeout_and_says_so(nursery: trio.Nursery) -> None:
    model, life = await living(nursery)
    await with_region(model)
    async with attached_vp(model) as vp:
        model.partition.vps[0] = vp.processor
        mapping = model.gates.hold(Point.MAP)
        await vp.peer.send_intercept(GFN)
        await mapping.wait_reached()
        with capture_logs() as logs:
            model.partition.end()
            await trio.sleep(2 * TIMEOUT)
            mapping.open()
            await life.result()
    assert [log["event"] for log in logs] == ["partition_end_cut_short", "partition_ended"]


async def test_a_vmm_whose_call_loses_the_partition_gets_that_error() -> None:
    model = ModelPartition()

    async def unmap() -> None:
        await with_region(model)
        await model.fault(GFN)
        model.hypervisor.refuse_unmaps()
        await model.remove_region(GFN, PAGES, PAGE)

    with capture_logs(), pytest.raises(WireError, match="the partition is lost") as lost:
        await model.partition.run(unmap)
    assert (lost.value.number, model.partition.lost) == (errno.EIO, True)


async def test_an_end_whose_unmap_is_refused_continues_and_logs_what_is_left(nursery: trio.Nursery) -> None:
    """Nobody is left to reach it: the VMM goes as well."""
    model, life = await living(nursery)
    await with_region(model)
    await model.fault(GFN)
    model.hypervisor.refuse_unmaps()
    with capture_logs() as logs:
        model.partition.end()
        await life.result()
    assert [log["event"] for log in logs] == ["mappings_left", "partition_ended"]
    assert not model.partition.lost


async def test_a_partition_ends_with_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    model = ModelPartition()

    async def run() -> None:
        """The process is gone."""

    monkeypatch.setattr(model.declared, "run", run)
    with capture_logs() as logs:
        await model.partition.run(trio.sleep_forever)
    assert [log["event"] for log in logs] == ["partition_created", "memory_gone", "partition_ended"]


# ------------------------------------------------ the hypervisor connection


@asynccontextmanager
async def linked(model: ModelPartition) -> AsyncIterator[tuple[RemoteHypervisor, RawPeer]]:
    """With a hypervisor connection, as the partition and as the VMM see it; it has been welcomed."""
    ours, theirs = socket.socketpair()
    link, peer = RemoteHypervisor(deadline=lambda: 1.0), RawPeer.of(theirs)
    connection = Connection(ours, Tenants(Limits), HangupWatch())
    connection.expect_responses()
    model.partition.start_link(link, connection, rpc.encode_result(1, None))
    await peer.response()
    yield link, peer
    peer.close()


async def test_a_partition_is_lost_with_its_hypervisor_connection(nursery: trio.Nursery) -> None:
    model, life = await living(nursery)
    async with linked(model) as (link, peer):
        claimed = link.claimed
        peer.close()
        with capture_logs(), pytest.raises(WireError, match="the hypervisor connection closed"):
            await life.result()
    assert (claimed, link.claimed, model.partition.lost) == (True, False, True)


async def test_a_vmm_that_exits_closes_its_hypervisor_connection_first_and_loses_nothing(
    nursery: trio.Nursery,
) -> None:
    model, life = await living(nursery)
    async with linked(model) as (_, peer):
        peer.close()
        await wait_all_tasks_blocked()
        model.partition.end()
        await life.result()
    assert not model.partition.lost


async def test_the_msgid_of_a_request_to_the_vmm_is_never_0(nursery: trio.Nursery) -> None:
    """After the last one, which 2^32 requests take, the daemon begins again at 1."""
    model, life = await living(nursery)
    async with linked(model) as (link, peer):
        link._msgid = rpc.MSGID_LIMIT - 1
        unmapping = Running(nursery, link.unmap_gpas, [GfnRange(start=0, end=1)])
        request = await peer.receive()
        assert isinstance(request, rpc.Request)
        await peer.send(rpc.encode_result(request.msgid, None))
        await unmapping.result()
        model.partition.end()
        await life.result()
    assert request.msgid == 1


# ------------------------------------------------ losing it


async def test_of_several_tasks_that_lose_the_partition_one_ends_the_others_in_turn() -> None:
    model = ModelPartition()
    ends: list[str] = []
    peers: list[socket.socket] = []

    async def lose(name: str) -> None:
        try:
            await trio.lowlevel.checkpoint()
            raise PartitionLost(name)
        finally:
            ends.append(name)

    async def serve_vmm() -> None:
        for name in ("a", "b", "c"):
            ours, theirs = socket.socketpair()
            peers.append(theirs)
            connection = Connection(ours, Tenants(Limits), HangupWatch())
            model.partition.start_notifier(connection, b"", partial(lose, name), trio.lowlevel.checkpoint)
        await lose("vmm")

    with capture_logs() as logs, pytest.raises(WireError, match=r"the partition is lost: (a|b|c|vmm)$"):
        with trio.fail_after(LAST_ANSWERS_SECONDS / 2):
            await model.partition.run(serve_vmm)
    for peer in peers:
        peer.close()
    assert sorted(ends) == ["a", "b", "c", "vmm"]
    assert model.partition.notifiers == 0
    assert [entry["event"] for entry in logs if entry["log_level"] == "critical"] == ["partition_lost"]


async def test_an_unmap_that_is_refused_loses_the_partition_loudly() -> None:
    model = ModelPartition()

    async def lose() -> None:
        await with_region(model)
        await model.fault(GFN)
        model.hypervisor.refuse_unmaps()
        await model.invalidate(PAGE, PAGES)

    with capture_logs() as logs, pytest.raises(WireError, match="the partition is lost") as lost:
        await model.partition.run(lose)
    assert (lost.value.number, model.partition.lost) == (errno.EIO, True)
    assert [entry["event"] for entry in logs if entry["log_level"] == "critical"] == ["partition_lost"]


async def test_an_unmap_that_is_refused_is_not_acknowledged(nursery: trio.Nursery) -> None:
    model, life = await living(nursery)
    await with_region(model)
    await model.fault(GFN)
    model.hypervisor.refuse_unmaps()
    batch = model.notifier.invalidate(model.regions.first_regions(1)[0].uaddrs)
    with pytest.raises(WireError, match="the partition is lost"):
        await life.result()
    assert not batch.done.is_set()


async def test_a_token_of_another_uid_is_not_admitted() -> None:
    partition = ModelPartition().partition
    assert partition.admits(partition.token, Peer(9, partition.owner.uid, 9))
    assert not partition.admits(partition.token, Peer(1, partition.owner.uid + 1, 0))
    assert not partition.admits(bytes(16), partition.owner)


async def test_tokens_are_drawn_and_never_shown() -> None:
    first, second = ModelPartition().partition, ModelPartition().partition
    assert first.token != second.token
    assert repr(first.token) not in repr(first)


# ------------------------------------------------ over the wire


async def test_a_vmm_that_leaves_ends_its_partition_and_closes_all_of_it() -> None:
    async with serving() as served:
        await wait_all_tasks_blocked()
        before = trio.lowlevel.current_statistics().tasks_living
        guest = await served.guest()
        await served.mmio(guest)
        vp, notifier = await served.vp(guest), await served.notifier(guest)
        await vp.intercept(0x100)
        guest.vmm.close()
        assert (await vp.receive(), await notifier.receive()) == (None, None)
        await wait_all_tasks_blocked()
        assert len(served.daemon.partitions) == 0
        assert trio.lowlevel.current_statistics().tasks_living == before


async def test_an_intercept_in_flight_is_answered_before_its_partition_ends() -> None:
    async with serving() as served:
        guest = await served.guest()
        await served.mmio(guest)
        vp, notifier = await served.vp(guest), await served.notifier(guest)
        await notifier.ask("invalidate_begin", start_uaddr=0x9000000, length=0x1000)
        await vp.send_intercept(0x100)
        await wait_all_tasks_blocked()
        guest.vmm.close()
        assert await vp.answer() is Answer.DRAINING
        assert await vp.receive() is None


async def test_an_intercept_whose_map_does_not_return_does_not_block_the_end(
    nursery: trio.Nursery,
) -> None:
    model, life = await living(nursery)
    await with_region(model)
    started = trio.current_time()
    model.gates.hold(Point.RESOLVE)
    fault = Running(nursery, model.fault, GFN)
    model.partition.end()
    await life.result()
    await fault.result()
    assert trio.current_time() - started <= TIMEOUT


async def test_one_vps_failure_stays_its_own() -> None:
    async with serving() as served:
        guest = await served.guest()
        await served.mmio(guest)
        rude, polite = await served.vp(guest, 0), await served.vp(guest, 1)
        await rude.send(b"\xc1")
        assert (await rude.last_words()).number == errno.EBADMSG
        assert await polite.intercept(0x100) is Answer.MAPPED
        assert await guest.vmm.ask("translate", gfn=0x100) is not None


async def test_i7_a_lost_partition_ends_alone_and_its_vmm_learns_why(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def refuse(*_: object) -> None:
        raise HypervisorError(errno.EIO, "refused by order of the test")

    async with serving() as served:
        doomed, other = await served.guest(), await served.guest()
        vps = []
        for guest in (doomed, other):
            await served.mmio(guest)
            vps.append(await served.vp(guest))
            await vps[-1].intercept(0x100)
        partition = served.daemon.partitions.find(doomed.partition_id)
        assert partition is not None
        monkeypatch.setattr(partition.hypervisor, "unmap_gpas", refuse)
        with capture_logs() as logs:
            await doomed.vmm.request("unmap_vma", {"start_uaddr": 0x9000000, "page_count": 1})
            assert (await doomed.vmm.last_words()).number == errno.EIO
        assert await vps[0].receive() is None
        assert await vps[1].intercept(0x100) is Answer.ALREADY_MAPPED
        assert [each.partition_id for each in served.daemon.partitions] == [other.partition_id]
        assert (await served.daemon.daemon_statistics()).partitions_lost == 1
        assert "partition_lost" in [entry["event"] for entry in logs]


async def test_i7_an_invalidation_does_not_affect_another_partition() -> None:
    async with serving() as served:
        one, other = await served.guest(), await served.guest()
        await served.mmio(one, 0x7000)
        await served.mmio(other, 0xB000)
        vps = [await served.vp(one), await served.vp(other)]
        for vp in vps:
            await vp.intercept(0x105)
        await one.vmm.ask("unmap_vma", start_uaddr=0x9000000, page_count=16)
        translated = [await guest.vmm.ask("translate", gfn=0x105) for guest in (one, other)]
        assert translated == [None, {"frame": ["host", 0xB005], "access": 3, "pfn": 0xB005}]


# ------------------------------------------------ the daemon's drain


async def test_drain_answers_waiting_requests_closes_all_connections_and_ends() -> None:
    async with serving() as served:
        guest = await served.guest()
        await served.mmio(guest)
        vp, notifier = await served.vp(guest), await served.notifier(guest)
        await notifier.ask("invalidate_begin", start_uaddr=0x9000000, length=0x1000)
        await vp.send_intercept(0x100)
        await wait_all_tasks_blocked()
        started = trio.current_time()
        await (await served.operator()).ask("drain", timeout_ms=1000)
        assert await vp.answer() is Answer.DRAINING
        assert (await vp.receive(), await notifier.receive(), await guest.vmm.receive()) == (None, None, None)
        await served.ended.wait()
        assert trio.current_time() == started


async def test_drain_that_takes_too_long_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving(timeouts=Timeouts(drain_ms=2000)) as served:
        guest = await served.guest()
        partition = served.daemon.partitions.find(guest.partition_id)
        assert partition is not None
        monkeypatch.setattr(partition, "_end", trio.sleep_forever)
        started = trio.current_time()
        with capture_logs() as logs:
            served.daemon.drain()
            await served.ended.wait()
        assert trio.current_time() - started == pytest.approx(2)
        assert "drain_cut_short" in [entry["event"] for entry in logs]


async def test_a_daemon_that_ended_leaves_no_socket_files() -> None:
    async with serving(Limits()) as served:
        served.daemon.drain()
        await served.ended.wait()
        with pytest.raises(FileNotFoundError):
            await served.connect()
