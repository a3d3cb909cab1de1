"""Orderings that a prototype got wrong (the design's section on the core), one test each."""

from __future__ import annotations

import errno

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from explorer.pauses import Point
from explorer.ports import Mapped, Unmapped
from fakes.model_partition import RW, ModelPartition
from fakes.one_region import GFN, PAGE, PAGES, PFN, with_region
from fakes.running import Running
from intercept_protocol.addresses import UaddrRange
from intercept_protocol.errors import WireError
from intercept_protocol.messages import RegionKind, Remap
from intercept_protocol.outcomes import Access, Answer

NOTHING = [None] * PAGES


# ------------------------------------------------ unmap_vma


async def test_unmap_vma_marks_stale_and_edits_before_anyone_else_runs(
    model: ModelPartition, nursery: trio.Nursery
) -> None:
    """A fault that begins while the guest's mapping is being revoked must not find the VMA."""
    await with_region(model)
    await model.fault(GFN)
    unmapping = model.gates.hold(Point.UNMAP)
    unmap = Running(nursery, model.unmap_vma, PAGE, PAGES)
    await unmapping.wait_reached()
    assert await model.declared.is_io(PAGE) is None
    assert model.notifier.open_invalidations == 1
    unmapping.open()
    await unmap.result()


async def test_unmap_vma_is_answered_after_the_unmap_and_the_range_is_closed_by_then(
    model: ModelPartition, nursery: trio.Nursery
) -> None:
    await with_region(model)
    await model.fault(GFN)
    unmapping = model.gates.hold(Point.UNMAP)
    unmap = Running(nursery, model.unmap_vma, PAGE, PAGES)
    await unmapping.wait_reached()
    await wait_all_tasks_blocked()
    assert not unmap.done
    unmapping.open()
    await unmap.result()
    assert model.notifier.open_invalidations == 0


async def test_unmap_vma_that_is_refused_closes_its_range() -> None:
    async with ModelPartition(vma_limit=1).running() as model:
        await with_region(model)
        with pytest.raises(WireError):
            await model.unmap_vma(PAGE + 4, 1)
        assert model.notifier.open_invalidations == 0
        assert await model.fault(GFN + 4) is Answer.MAPPED


# ------------------------------------------------ remove


async def test_remove_unlinks_before_it_unmaps(model: ModelPartition, nursery: trio.Nursery) -> None:
    await with_region(model)
    await model.fault(GFN)
    unmapping = model.gates.hold(Point.UNMAP)
    remove = Running(nursery, model.remove_region, GFN, PAGES, PAGE)
    await unmapping.wait_reached()
    assert model.regions.region_count == 0
    unmapping.open()
    await remove.result()


async def test_a_remove_that_has_begun_completes_despite_cancellation(
    model: ModelPartition, nursery: trio.Nursery
) -> None:
    await with_region(model)
    await model.fault(GFN)
    unmapping = model.gates.hold(Point.UNMAP)
    remove = Running(nursery, model.remove_region, GFN, PAGES, PAGE)
    await unmapping.wait_reached()
    nursery.start_soon(remove.cancel)
    await wait_all_tasks_blocked()
    assert not remove.done
    unmapping.open()
    await wait_all_tasks_blocked()
    assert model.pfns(GFN, PAGES) == NOTHING
    assert await model.fault(GFN) is Answer.NO_REGION


# ------------------------------------------------ add movable


async def test_add_movable_inserts_then_maps_no_access_and_a_fault_in_between_waits(
    model: ModelPartition, nursery: trio.Nursery
) -> None:
    """If it were mapped before it is inserted, the fault would get no_region."""
    await model.map_vma(PAGE, PAGES, PFN)
    mapping = model.gates.hold(Point.MAP)
    add = Running(nursery, model.add_region, GFN, PAGES, PAGE, RegionKind.MOVABLE)
    await mapping.wait_reached()
    fault = Running(nursery, model.fault, GFN)
    await wait_all_tasks_blocked()
    assert (fault.done, add.done) == (False, False)
    mapping.open()
    assert await add.result() is RegionKind.MOVABLE
    assert await fault.result() is Answer.MAPPED
    assert model.hypervisor.events == [
        Mapped(GFN, GFN + PAGES, None, Access.NONE),
        Mapped(GFN, GFN + PAGES, PFN, RW),
    ]


async def test_add_movable_that_the_hypervisor_refuses_leaves_no_region(model: ModelPartition) -> None:
    model.hypervisor.refuse_map(number=errno.ENOMEM)
    with pytest.raises(WireError) as refused:
        await model.add_region(GFN, PAGES, PAGE, RegionKind.MOVABLE)
    assert refused.value.number == errno.ENOMEM
    assert await model.fault(GFN) is Answer.NO_REGION


# ------------------------------------------------ roll-back


@pytest.mark.parametrize("remap", Remap)
async def test_roll_back_puts_back_no_access(remap: Remap) -> None:
    """ "Unmap what I mapped" would lose it, and the next touch would be an UNMAPPED_GPA."""
    async with ModelPartition(remap=remap).running() as model:
        await with_region(model, RegionKind.MOVABLE)
        model.hypervisor.refuse_map()
        assert await model.fault(GFN) is Answer.HYPERVISOR_ERROR
        assert model.hypervisor.counters().no_access_gfns == PAGES
        assert await model.fault(GFN) is Answer.MAPPED


async def test_roll_back_of_several_maps_puts_back_no_access_of_each(model: ModelPartition) -> None:
    await with_region(model, RegionKind.MOVABLE)
    await model.fault(GFN)
    await model.invalidate(PAGE, 4)
    await model.invalidate(PAGE + 8, 4)
    model.hypervisor.refuse_map(nth=2)
    assert await model.fault(GFN) is Answer.HYPERVISOR_ERROR
    assert model.hypervisor.counters().no_access_gfns == 8
    assert model.pfns(GFN, 5) == [None] * 4 + [PFN + 4]


# ------------------------------------------------ the pending set


async def test_pending_set_is_taken_after_the_lock_so_that_one_pass_serves_all(
    model: ModelPartition, nursery: trio.Nursery
) -> None:
    """If taken earlier, what came while the manager waited would need another pass."""
    await with_region(model)
    await model.fault(GFN)
    await model.map_vma(0xA000, 1, 0x8000)
    await model.add_region(0x200, 1, 0xA000)
    holder = model.gates.hold(Point.MAP)
    Running(nursery, model.fault, 0x200)
    await holder.wait_reached()
    first = model.notifier.invalidate(UaddrRange(start=PAGE, end=PAGE + 8))
    await wait_all_tasks_blocked()
    second = model.notifier.invalidate(UaddrRange(start=PAGE + 8, end=PAGE + 16))
    assert second is first
    holder.open()
    await first.done.wait()
    assert model.pfns(GFN, PAGES) == NOTHING


async def test_an_invalidation_that_comes_during_a_pass_is_served_by_the_next(
    model: ModelPartition, nursery: trio.Nursery
) -> None:
    await with_region(model)
    await model.fault(GFN)
    unmapping = model.gates.hold(Point.UNMAP)
    first = Running(nursery, model.invalidate, PAGE, 4)
    await unmapping.wait_reached()
    second = Running(nursery, model.invalidate, PAGE + 4, 4)
    await wait_all_tasks_blocked()
    unmapping.open()
    await first.result()
    await second.result()
    assert model.hypervisor.events[1:] == [Unmapped(GFN, GFN + 4), Unmapped(GFN + 4, GFN + 8)]


# ------------------------------------------------ being mapped is one slot


async def test_a_second_vp_does_not_resume_during_the_map_call(
    model: ModelPartition, nursery: trio.Nursery
) -> None:
    await with_region(model)
    mapping = model.gates.hold(Point.MAP)
    first = Running(nursery, model.fault, GFN)
    await mapping.wait_reached()
    second = Running(nursery, model.fault, GFN)
    await wait_all_tasks_blocked()
    assert not second.done
    mapping.open()
    assert await first.result() is Answer.MAPPED
    assert await second.result() is Answer.ALREADY_MAPPED


async def test_a_fault_on_a_page_that_is_being_unmapped_waits(
    model: ModelPartition, nursery: trio.Nursery
) -> None:
    """Told RESUME, the VP would run into the same fault at once, and be taken for one without progress."""
    await with_region(model)
    await model.fault(GFN)
    unmapping = model.gates.hold(Point.UNMAPPED)
    invalidate = Running(nursery, model.invalidate, PAGE, PAGES)
    await unmapping.wait_reached()
    fault = Running(nursery, model.fault, GFN)
    await wait_all_tasks_blocked()
    assert not fault.done
    unmapping.open()
    await invalidate.result()
    assert await fault.result() is Answer.MAPPED


async def test_a_fault_behind_a_call_that_does_not_return_is_contended(
    model: ModelPartition, nursery: trio.Nursery
) -> None:
    await with_region(model)
    mapping = model.gates.hold(Point.MAP)
    first = Running(nursery, model.fault, GFN)
    await mapping.wait_reached()
    assert await model.fault(GFN) is Answer.CONTENDED
    mapping.open()
    assert await first.result() is Answer.MAPPED
