"""A partition's life: its order of end, its failures, and that they are its own."""

from __future__ import annotations

import errno

import pytest
import trio
from structlog.testing import capture_logs
from trio.testing import wait_all_tasks_blocked

from fakes.model_partition import TIMEOUT, ModelPartition
from fakes.running import Running
from fakes.served import serving
from intercept_protocol.errors import WireError
from intercept_protocol.outcomes import Answer
from interceptctl.explore.pauses import Point
from interceptd.config import Limits, Timeouts
from interceptd.hypervisor import HypervisorError
from interceptd.peer import Peer

GFN, PAGE, PFN, PAGES = 0x100, 0x9000, 0x7000, 16


async def with_mmio(model: ModelPartition) -> None:
    await model.map_vma(PAGE, PAGES, PFN)
    await model.add_region(GFN, PAGES, PAGE)


# ------------------------------------------------ the end


async def test_i6_after_the_end_the_slat_is_empty_and_the_partition_admits_nobody(
    nursery: trio.Nursery,
) -> None:
    model = ModelPartition()
    life = Running(nursery, model.partition.run, trio.sleep_forever)
    await wait_all_tasks_blocked()
    await with_mmio(model)
    await model.fault(GFN)
    admitted = model.partition.admits(model.partition.token, model.partition.owner)
    model.partition.end()
    await life.result()
    assert model.hypervisor.counters().slat_extents == 0
    assert (admitted, model.partition.admits(model.partition.token, model.partition.owner)) == (True, False)


async def test_the_end_serves_what_is_pending_so_that_nobody_waits_in_vain(nursery: trio.Nursery) -> None:
    model = ModelPartition()
    life = Running(nursery, model.partition.run, trio.sleep_forever)
    await wait_all_tasks_blocked()
    await with_mmio(model)
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


async def test_the_end_comes_after_a_vmm_that_failed_and_its_failure_goes_on_up() -> None:
    model = ModelPartition()

    async def fail() -> None:
        await with_mmio(model)
        await model.fault(GFN)
        raise WireError(errno.EPROTO, "a mistake")

    with pytest.raises(WireError, match="a mistake"):
        await model.partition.run(fail)
    assert model.hypervisor.counters().slat_extents == 0
    assert not model.partition.lost


async def test_an_unmap_that_is_refused_loses_the_partition_loudly() -> None:
    model = ModelPartition()

    async def lose() -> None:
        await with_mmio(model)
        await model.fault(GFN)
        model.hypervisor.refuse_unmaps()
        await model.invalidate(PAGE, PAGES)

    with capture_logs() as logs, pytest.raises(WireError, match="the partition is lost") as lost:
        await model.partition.run(lose)
    assert (lost.value.number, model.partition.lost) == (errno.EIO, True)
    assert [entry["event"] for entry in logs if entry["log_level"] == "critical"] == ["partition_lost"]


async def test_an_unmap_that_is_refused_is_not_acknowledged(nursery: trio.Nursery) -> None:
    model = ModelPartition()
    life = Running(nursery, model.partition.run, trio.sleep_forever)
    await wait_all_tasks_blocked()
    await with_mmio(model)
    await model.fault(GFN)
    model.hypervisor.refuse_unmaps()
    batch = model.notifier.invalidate(model.regions.first_regions(1)[0][0].uaddrs)
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


async def test_an_intercept_in_flight_whose_map_does_not_return_does_not_hold_the_end_for_ever(
    nursery: trio.Nursery,
) -> None:
    model = ModelPartition()
    life = Running(nursery, model.partition.run, trio.sleep_forever)
    await wait_all_tasks_blocked()
    await with_mmio(model)
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


async def test_i7_a_lost_partition_ends_alone_and_its_vmm_is_told_why(
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
        monkeypatch.setattr(partition.hypervisor, "unmap_gpa", refuse)
        with capture_logs() as logs:
            await doomed.vmm.request("unmap_vma", {"start_uaddr": 0x9000000, "page_count": 1})
            assert (await doomed.vmm.last_words()).number == errno.EIO
        assert await vps[0].receive() is None
        assert await vps[1].intercept(0x100) is Answer.ALREADY_MAPPED
        assert [each.partition_id for each in served.daemon.partitions] == [other.partition_id]
        assert served.daemon.daemon_statistics().partitions_lost == 1
        assert "partition_lost" in [entry["event"] for entry in logs]


async def test_i7_what_one_partition_invalidates_is_nothing_to_another() -> None:
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


async def test_drain_answers_what_waits_closes_everyone_and_ends() -> None:
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
