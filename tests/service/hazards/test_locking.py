"""Hazards of the list and its lock: H1, H6, c and s of the review."""

from __future__ import annotations

import trio
from hypothesis import given
from hypothesis import strategies as st
from trio.testing import MockClock, wait_all_tasks_blocked

from explorer.pauses import Point
from fakes.drawn import pauses
from fakes.model_partition import ModelPartition
from fakes.one_region import GFN, PAGE, PAGES, with_region
from fakes.pauses import DrawnPauses
from fakes.running import Running
from intercept_protocol.addresses import UaddrRange
from intercept_protocol.outcomes import Answer


async def test_h1_a_region_is_removed_while_a_fault_in_it_resolves(
    model: ModelPartition, nursery: trio.Nursery
) -> None:
    """H1: nothing that may sleep runs under the lock of the list."""
    await with_region(model)
    gate = model.gates.hold(Point.RESOLVE)
    fault = Running(nursery, model.fault, GFN)
    await gate.wait_reached()
    with trio.fail_after(1):
        await model.remove_region(GFN, PAGES, PAGE)
    assert not fault.done


async def test_h1_an_invalidation_is_served_while_a_fault_resolves(
    model: ModelPartition, nursery: trio.Nursery
) -> None:
    """H1: the caller that waits for the acknowledgement may hold what resolve waits for."""
    await with_region(model)
    gate = model.gates.hold(Point.RESOLVED)
    fault = Running(nursery, model.fault, GFN)
    await gate.wait_reached()
    with trio.fail_after(1):
        await model.unmap_vma(PAGE, PAGES)
    assert not fault.done


@given(pauses(), st.integers(0, 4))
def test_h6_a_fault_during_a_remove_maps_nothing_that_outlives_the_region(
    checkpoints: list[int], head_start: int
) -> None:
    """H6: looking up and joining the attempts is one step, so a remove comes before or after it."""

    async def main() -> None:
        async with (
            ModelPartition(pauses=DrawnPauses(checkpoints)).running() as model,
            trio.open_nursery() as vps,
        ):
            await with_region(model)
            vps.start_soon(model.fault, GFN)
            for _ in range(head_start):
                await trio.lowlevel.checkpoint()
            await model.remove_region(GFN, PAGES, PAGE)
        assert model.pfns(GFN, PAGES) == [None] * PAGES

    trio.run(main, clock=MockClock(autojump_threshold=0))


async def test_c_a_region_that_was_removed_after_its_lookup_is_not_used(
    model: ModelPartition, nursery: trio.Nursery
) -> None:
    """c: between the look-up and the use the lock is dropped; by then the region may be gone."""
    await with_region(model)
    gate = model.gates.hold(Point.RESOLVED)
    fault = Running(nursery, model.fault, GFN)
    await gate.wait_reached()
    await model.remove_region(GFN, PAGES, PAGE)
    gate.open()
    assert await fault.result() is Answer.NO_REGION
    assert model.pfns(GFN, PAGES) == [None] * PAGES


async def test_c_a_region_that_replaced_the_looked_up_one_maps_its_own_frames(
    model: ModelPartition, nursery: trio.Nursery
) -> None:
    """c: start and length may come from one region and the frame from another, unless it is checked again."""
    await with_region(model)
    gate = model.gates.hold(Point.RESOLVED)
    fault = Running(nursery, model.fault, GFN + 3)
    await gate.wait_reached()
    await model.remove_region(GFN, PAGES, PAGE)
    await model.map_vma(0xA000, PAGES, 0x8000)
    await model.add_region(GFN, PAGES, 0xA000)
    gate.open()
    assert await fault.result() is Answer.MAPPED
    assert model.pfns(GFN, PAGES) == [*range(0x8000, 0x8000 + PAGES)]


async def test_s_a_commit_that_waits_for_the_lock_behind_a_remove_maps_nothing(
    model: ModelPartition, nursery: trio.Nursery
) -> None:
    """s (1): no map after the unlink."""
    await with_region(model)
    await model.fault(GFN)
    await model.invalidate(PAGE + 8, 1)
    gate = model.gates.hold(Point.RESOLVED)
    fault = Running(nursery, model.fault, GFN + 8)
    await gate.wait_reached()
    unmapping = model.gates.hold(Point.UNMAP)
    remove = Running(nursery, model.remove_region, GFN, PAGES, PAGE)
    await unmapping.wait_reached()
    gate.open()
    await wait_all_tasks_blocked()
    unmapping.open()
    await remove.result()
    assert await fault.result() is Answer.NO_REGION
    assert model.pfns(GFN, PAGES) == [None] * PAGES


async def test_s_a_new_region_is_not_added_while_the_old_one_is_unmapped(
    model: ModelPartition, nursery: trio.Nursery
) -> None:
    """s (2): a late unmap of the old region would tear the new one's mappings down."""
    await with_region(model)
    await model.fault(GFN)
    await model.map_vma(0xA000, PAGES, 0x8000)
    unmapping = model.gates.hold(Point.UNMAP)
    remove = Running(nursery, model.remove_region, GFN, PAGES, PAGE)
    await unmapping.wait_reached()
    add = Running(nursery, model.add_region, GFN, PAGES, 0xA000)
    fault = Running(nursery, model.fault, GFN)
    await wait_all_tasks_blocked()
    assert not add.done
    unmapping.open()
    await remove.result()
    await add.result()
    assert await fault.result() in {Answer.MAPPED, Answer.NO_REGION}
    assert await model.fault(GFN) in {Answer.MAPPED, Answer.ALREADY_MAPPED}
    assert model.pfns(GFN, PAGES) == [*range(0x8000, 0x8000 + PAGES)]


async def test_s_the_new_regions_mappings_survive_everything_that_the_old_one_left_behind(
    model: ModelPartition,
) -> None:
    """s (2): invalidations of the old region's memory are none of the new one's."""
    await with_region(model)
    await model.fault(GFN)
    await model.remove_region(GFN, PAGES, PAGE)
    await model.map_vma(0xA000, PAGES, 0x8000)
    await model.add_region(GFN, PAGES, 0xA000)
    await model.fault(GFN)
    await model.unmap_vma(PAGE, PAGES)
    await model.notifier.invalidate(UaddrRange(start=PAGE, end=PAGE + PAGES)).done.wait()
    assert model.pfns(GFN, PAGES) == [*range(0x8000, 0x8000 + PAGES)]
