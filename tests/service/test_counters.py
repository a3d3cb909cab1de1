"""Counters and times are taken where things happen, and the sums are exact."""

from __future__ import annotations

from collections.abc import AsyncIterator
from time import perf_counter_ns

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from fakes.model_partition import ModelPartition
from fakes.model_vp import attached_vp
from fakes.one_region import GFN, PAGE, PAGES, with_region
from fakes.served import Guest, Served, serving
from intercept_protocol.addresses import UaddrRange
from intercept_protocol.errors import WireError
from intercept_protocol.outcomes import Access, Answer
from interceptd.hypervisor import HypervisorError
from interceptd.hypervisor.measured import MeasuredHypervisor
from interceptd.mmu_notifier import MmuNotifier
from interceptd.pages.mapping import Mapping
from interceptd.telemetry.counters import PortCalls, Source, Totals
from interceptd.telemetry.event_bus import EventBus

RESERVED = Mapping(0x400, 0x410, None, 0, Access.NONE)


@pytest.fixture
async def backed(model: ModelPartition) -> ModelPartition:
    await with_region(model)
    return model


@pytest.fixture
async def served() -> AsyncIterator[Served]:
    async with serving() as running:
        yield running


def stage_counts(model: ModelPartition) -> dict[str, int]:
    stages = model.faults.stages
    return {name: getattr(stages, name).count for name in ("decode", "wait", "resolve", "map")}


# ------------------------------------------------ stages


async def test_an_intercept_that_maps_is_decoded_resolved_and_mapped(backed: ModelPartition) -> None:
    async with attached_vp(backed) as vp:
        await vp.peer.intercept(GFN)
        assert stage_counts(backed) == {"decode": 1, "wait": 0, "resolve": 1, "map": 1}


async def test_an_intercept_that_one_look_decides_has_no_stages(backed: ModelPartition) -> None:
    async with attached_vp(backed) as vp:
        await vp.peer.intercept(0)
        assert stage_counts(backed) == {"decode": 0, "wait": 0, "resolve": 0, "map": 0}
        assert vp.processor.latency.at_once.count == 1


@pytest.mark.parametrize("interrupted", [False, True])
async def test_an_intercept_that_waited_for_an_invalidation_is_counted_apart(
    backed: ModelPartition, interrupted: bool
) -> None:
    """However its wait ended; and the next one, which did not wait, is not."""
    async with attached_vp(backed) as vp:
        await backed.begin(PAGE, PAGES)
        await vp.peer.send_intercept(GFN)
        await wait_all_tasks_blocked()
        if interrupted:
            vp.processor.kick()
        else:
            backed.end(PAGE, PAGES)
        assert await vp.peer.answer() is (Answer.KICKED if interrupted else Answer.MAPPED)
        latency = vp.processor.latency
        assert (latency.at_once.count, latency.waited.count) == (0, 1)
        if interrupted:
            backed.end(PAGE, PAGES)
        await vp.peer.intercept(GFN + 1)
        assert (latency.at_once.count, latency.waited.count, latency.all.count) == (1, 1, 2)


@pytest.mark.parametrize("obstructed", [False, True])
async def test_a_blocking_resolve_does_not_count_as_waiting_and_hides_no_wait(
    backed: ModelPartition, obstructed: bool
) -> None:
    backed.address_space.may_block = True
    async with attached_vp(backed) as vp:
        if obstructed:
            await backed.begin(PAGE, PAGES)
        await vp.peer.send_intercept(GFN)
        await wait_all_tasks_blocked()
        if obstructed:
            backed.end(PAGE, PAGES)
        assert await vp.peer.answer() is Answer.MAPPED
        latency = vp.processor.latency
        assert (latency.at_once.count, latency.waited.count) == (not obstructed, obstructed)


async def test_an_intercept_that_a_kept_kick_answers_instead_of_its_wait_did_not_wait(
    backed: ModelPartition,
) -> None:
    async with attached_vp(backed) as vp:
        await backed.begin(PAGE, PAGES)
        vp.processor.kick()
        assert await vp.peer.intercept(GFN) is Answer.KICKED
        assert (vp.processor.latency.at_once.count, vp.processor.latency.waited.count) == (1, 0)


async def test_a_fault_that_waits_for_an_invalidation_is_timed_as_waiting(backed: ModelPartition) -> None:
    await backed.begin(PAGE, PAGES)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(backed.fault, GFN)
        await wait_all_tasks_blocked()
        backed.end(PAGE, PAGES)
    assert stage_counts(backed) == {"decode": 0, "wait": 1, "resolve": 1, "map": 1}


async def test_a_stage_takes_no_longer_than_the_fault(backed: ModelPartition) -> None:
    before = perf_counter_ns()
    await backed.fault(GFN)
    assert backed.faults.stages.resolve.total_ns <= perf_counter_ns() - before


async def test_a_wait_that_is_cancelled_is_timed_all_the_same(backed: ModelPartition) -> None:
    await backed.begin(PAGE, PAGES)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(backed.fault, GFN)
        await wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    assert stage_counts(backed)["wait"] == 1


async def test_calls_of_the_hypervisor_are_timed_refused_ones_too(backed: ModelPartition) -> None:
    calls = PortCalls()
    measured = MeasuredHypervisor(backed.hypervisor, calls)
    await measured.map_gpas([RESERVED])
    backed.hypervisor.refuse_map()
    with pytest.raises(HypervisorError):
        await measured.map_gpas([RESERVED])
    await measured.unmap_gpas([RESERVED.gfns])
    assert (calls.map_gpa.count, calls.unmap_gpa.count) == (2, 1)


async def test_calls_of_a_served_partition_are_in_its_totals(served: Served) -> None:
    guest = await served.guest()
    await served.mmio(guest)
    vp = await served.vp(guest)
    await vp.intercept(0x100)
    assert (await served.daemon.partitions.totals()).port_calls.map_gpa.count == 1


# ------------------------------------------------ invalidations


async def test_invalidations_are_counted_by_source(backed: ModelPartition) -> None:
    await backed.invalidate(PAGE, 1)
    await backed.protect_vma(PAGE, PAGES, Access.READ)
    await backed.unmap_vma(PAGE, 4)
    await backed.unmap_vma(PAGE + 8, 4)
    counted = backed.partition.totals().invalidations
    assert counted == {Source.NOTIFIER: 1, Source.PROTECT_VMA: 1, Source.UNMAP_VMA: 2}


async def test_a_pass_is_timed_once_for_all_that_it_serves() -> None:
    notifier = MmuNotifier(open_limit=lambda: 1, event_bus=EventBus())
    notifier.invalidate(UaddrRange(start=0, end=1))
    notifier.invalidate(UaddrRange(start=8, end=9))
    notifier.served(notifier.take())
    assert notifier.passes.count == 1


async def test_a_pass_is_timed_from_the_oldest_invalidation_that_it_serves() -> None:
    notifier, before = MmuNotifier(open_limit=lambda: 1, event_bus=EventBus()), perf_counter_ns()
    began = notifier.invalidate(UaddrRange(start=0, end=1)).began_ns
    assert notifier.invalidate(UaddrRange(start=8, end=9)).began_ns == began
    notifier.served(notifier.take())
    assert notifier.passes.total_ns <= perf_counter_ns() - before


async def test_a_pass_with_nothing_to_serve_is_not_timed() -> None:
    notifier = MmuNotifier(open_limit=lambda: 1, event_bus=EventBus())
    notifier.served(notifier.take())
    assert notifier.passes.count == 0


# ------------------------------------------------ sums


async def test_a_partition_that_ends_while_the_parts_are_added_is_counted_once(served: Served) -> None:
    first, second = await served.guest(), await served.guest()
    for guest in (first, second):
        vp = await served.vp(guest)
        await vp.intercept(0)
    parts, whole = served.daemon.partitions.parts(), Totals()
    for guest in (first, second):
        guest.vmm.close()
    await wait_all_tasks_blocked()
    for part in parts:
        whole.add(part)
    assert whole.answers == (await served.daemon.partitions.totals()).answers == {Answer.NO_REGION: 2}
    assert whole.intercepts.count == 2


async def test_the_sums_are_the_readers_own(served: Served) -> None:
    guest = await served.guest()
    vp = await served.vp(guest)
    await vp.intercept(0)
    before = await served.daemon.partitions.totals()
    await vp.intercept(0)
    assert before.intercepts.count == before.answers.total() == 1


# ------------------------------------------------ refusals


async def refused(served: Served, role: str, **fields: object) -> None:
    with pytest.raises(WireError):
        await served.hello(role, **fields)


async def test_refused_hellos_are_counted_by_their_error(served: Served) -> None:
    guest: Guest = await served.guest()
    joining = {"partition_id": guest.partition_id, "token": guest.token}
    await served.vp(guest, 0)
    await refused(served, "operator")
    await refused(served, "vp", **joining | {"token": bytes(16)}, vp_index=1)
    await refused(served, "vp", **joining, vp_index=0)
    assert served.daemon.dispatcher.admission.refusals == {"EACCES": 2, "EEXIST": 1}


async def test_a_peer_that_leaves_before_hello_is_counted(served: Served) -> None:
    peer = await served.connect()
    peer.close()
    await wait_all_tasks_blocked()
    assert served.daemon.dispatcher.admission.refusals == {"left": 1}


async def test_an_invalid_hello_is_counted_by_its_error(served: Served) -> None:
    peer = await served.connect()
    with pytest.raises(WireError, match="EPROTO"):
        await peer.ask("statistics")
    assert served.daemon.dispatcher.admission.refusals == {"EPROTO": 1}
