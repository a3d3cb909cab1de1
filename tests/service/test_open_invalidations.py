"""Faults in and around an invalidation between begin and end, and answers that went stale."""

from __future__ import annotations

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from explorer.pauses import Point
from explorer.ports import Mapped
from fakes.model_partition import RW, TIMEOUT, ModelPartition
from fakes.one_region import GFN, PAGE, PAGES, PFN, with_region
from fakes.running import Running
from intercept_protocol.outcomes import Access, Answer
from interceptd.memory.fault_handler import ROUNDS


async def test_a_fault_in_an_open_invalidation_waits_for_its_end(
    model: ModelPartition, nursery: trio.Nursery
) -> None:
    await with_region(model)
    await model.begin(PAGE + 4, 4)
    fault = Running(nursery, model.fault, GFN + 5)
    await wait_all_tasks_blocked()
    assert (fault.done, model.hypervisor.events) == (False, [])
    model.end(PAGE + 4, 4)
    assert await fault.result() is Answer.MAPPED


async def test_a_fault_in_an_open_invalidation_is_answered_in_bounded_time(
    model: ModelPartition,
) -> None:
    await with_region(model)
    await model.begin(PAGE, PAGES)
    started = trio.current_time()
    assert await model.fault(GFN) is Answer.INVALIDATING
    assert trio.current_time() - started == pytest.approx(TIMEOUT)


async def test_nested_begins_keep_faults_out_until_the_last_end(
    model: ModelPartition, nursery: trio.Nursery
) -> None:
    await with_region(model)
    await model.begin(PAGE, PAGES)
    await model.begin(PAGE, PAGES)
    model.end(PAGE, PAGES)
    fault = Running(nursery, model.fault, GFN)
    await wait_all_tasks_blocked()
    assert not fault.done
    model.end(PAGE, PAGES)
    assert await fault.result() is Answer.MAPPED


async def test_a_region_added_inside_an_open_invalidation_respects_it(
    model: ModelPartition, nursery: trio.Nursery
) -> None:
    await model.map_vma(PAGE, PAGES, PFN)
    await model.begin(PAGE, PAGES)
    await model.add_region(GFN, PAGES, PAGE)
    fault = Running(nursery, model.fault, GFN)
    await wait_all_tasks_blocked()
    assert (fault.done, model.hypervisor.events) == (False, [])
    model.end(PAGE, PAGES)
    assert await fault.result() is Answer.MAPPED


@pytest.mark.parametrize("page", [3, 5])
async def test_a_fault_next_to_an_open_invalidation_does_not_wait(model: ModelPartition, page: int) -> None:
    await with_region(model)
    await model.begin(PAGE + 4, 1)
    assert await model.fault(GFN + page) is Answer.MAPPED


async def test_a_fault_beside_open_invalidations_maps_only_what_lies_between_them(
    model: ModelPartition,
) -> None:
    """The attempt's window is cut back, or its commit would map what is going."""
    await with_region(model)
    await model.begin(PAGE, 2)
    await model.begin(PAGE + 10, 3)
    assert await model.fault(GFN + 5) is Answer.MAPPED
    assert model.hypervisor.events == [Mapped(GFN + 2, GFN + 10, PFN + 2, RW)]


async def test_a_begin_that_ended_before_the_commit_still_makes_the_attempt_stale(
    model: ModelPartition, nursery: trio.Nursery
) -> None:
    """Begin and end in between leave no trace in the open ranges; only the attempt knows."""
    await with_region(model)
    gate = model.gates.hold(Point.RESOLVED)
    fault = Running(nursery, model.fault, GFN)
    await gate.wait_reached()
    await model.begin(PAGE, 1)
    model.end(PAGE, 1)
    gate.open()
    assert await fault.result() is Answer.MAPPED
    assert model.address_space.resolved == [PAGE, PAGE]


async def test_an_invalidation_beside_the_attempts_window_does_not_make_it_stale(
    model: ModelPartition, nursery: trio.Nursery
) -> None:
    await with_region(model)
    gate = model.gates.hold(Point.RESOLVED)
    fault = Running(nursery, model.fault, GFN)
    await gate.wait_reached()
    await model.invalidate(PAGE + PAGES, 1)
    gate.open()
    assert await fault.result() is Answer.MAPPED
    assert model.address_space.resolved == [PAGE]


# ------------------------------------------------ a "no" can be stale too


async def test_an_unbacked_that_went_stale_is_not_said(model: ModelPartition, nursery: trio.Nursery) -> None:
    """The VMA was on its way out when the fault looked, and has been replaced since."""
    await with_region(model)
    await model.unmap_vma(PAGE, PAGES)
    gate = model.gates.hold(Point.RESOLVED)
    fault = Running(nursery, model.fault, GFN)
    await gate.wait_reached()
    await model.invalidate(PAGE, PAGES)
    await model.map_vma(PAGE, PAGES, 0x8000)
    gate.open()
    assert await fault.result() is Answer.MAPPED
    assert model.address_space.extents[0] is None


async def test_a_permission_that_went_stale_is_not_said(model: ModelPartition, nursery: trio.Nursery) -> None:
    await model.map_vma(PAGE, PAGES, PFN, Access.READ)
    await model.add_region(GFN, PAGES, PAGE)
    gate = model.gates.hold(Point.RESOLVED)
    fault = Running(nursery, model.fault, GFN, Access.WRITE)
    await gate.wait_reached()
    await model.protect_vma(PAGE, PAGES, RW)
    gate.open()
    assert await fault.result() is Answer.MAPPED


async def test_a_fault_whose_region_was_removed_meanwhile_is_not_unbacked(
    model: ModelPartition, nursery: trio.Nursery
) -> None:
    await model.add_region(GFN, PAGES, PAGE)
    gate = model.gates.hold(Point.RESOLVED)
    fault = Running(nursery, model.fault, GFN)
    await gate.wait_reached()
    await model.remove_region(GFN, PAGES, PAGE)
    gate.open()
    assert await fault.result() is Answer.NO_REGION


# ------------------------------------------------ bounds


async def test_a_fault_whose_memory_is_invalidated_endlessly_is_retry(
    model: ModelPartition, nursery: trio.Nursery
) -> None:
    """A VMM that invalidates without end keeps its own VPs busy, not ours."""
    await with_region(model)
    gates = [model.gates.hold(Point.RESOLVED) for _ in range(ROUNDS)]
    fault = Running(nursery, model.fault, GFN)
    for gate in gates:
        await gate.wait_reached()
        await model.invalidate(PAGE, 1)
        gate.open()
    assert await fault.result() is Answer.CONTENDED
    assert model.address_space.resolved == [PAGE] * ROUNDS
    assert model.hypervisor.events == []


async def test_the_notifier_is_not_blocked_by_a_manager_that_is(
    model: ModelPartition, nursery: trio.Nursery
) -> None:
    """The source's munmap is blocked until its event is read: reading must not wait for the daemon."""
    await with_region(model)
    await model.fault(GFN)
    unmapping = model.gates.hold(Point.UNMAP)
    served = Running(nursery, model.invalidate, PAGE, 1)
    await unmapping.wait_reached()
    with trio.testing.assert_no_checkpoints():
        batch = model.notifier.invalidate(model.regions.first_regions(1)[0].uaddrs)
    assert not batch.done.is_set()
    unmapping.open()
    await served.result()
    await batch.done.wait()
    assert model.pfns(GFN, PAGES) == [None] * PAGES


async def test_a_mapping_being_invalidated_is_not_an_answer(
    model: ModelPartition, nursery: trio.Nursery
) -> None:
    """Between the event and the unmap the SLAT still serves the page; no VP is resumed."""
    await with_region(model)
    await model.fault(GFN)
    await model.map_vma(0xA000, 1, 0x6000)
    await model.add_region(0x200, 1, 0xA000)
    holder = model.gates.hold(Point.MAP)
    Running(nursery, model.fault, 0x200)
    await holder.wait_reached()
    invalidate = Running(nursery, model.invalidate, PAGE, PAGES)
    await wait_all_tasks_blocked()
    fault = Running(nursery, model.fault, GFN)
    await wait_all_tasks_blocked()
    assert not fault.done
    holder.open()
    await invalidate.result()
    assert await fault.result() is Answer.MAPPED
