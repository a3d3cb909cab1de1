"""Hazards of unmapped memory: H3, H4, e and k of the review."""

from __future__ import annotations

import pytest
import trio
from structlog.testing import capture_logs
from trio.testing import wait_all_tasks_blocked

from explorer.pauses import Point
from fakes.model_partition import ModelPartition
from fakes.one_region import GFN, PAGE, PAGES, PFN, with_region
from fakes.running import Running
from intercept_protocol.messages import RegionKind
from intercept_protocol.outcomes import Access, Answer
from interceptd.memory.region import RegionState

NEW_PFN = 0x8000
OLD = [*range(PFN, PFN + PAGES)]
NEW = [*range(NEW_PFN, NEW_PFN + PAGES)]
NOTHING = [None] * PAGES


async def with_all_mapped(model: ModelPartition, kind: RegionKind) -> None:
    """A region with all of its pages mapped."""
    await with_region(model, kind)
    await model.fault(GFN)
    assert model.pfns(GFN, PAGES) == OLD


@pytest.mark.parametrize("kind", RegionKind)
async def test_h4_no_slat_entry_of_the_old_frames_is_left_when_unmap_vma_is_answered(
    model: ModelPartition, kind: RegionKind
) -> None:
    """H4: the VMM reuses the memory as soon as it has the answer."""
    await with_all_mapped(model, kind)
    await model.unmap_vma(PAGE, PAGES)
    assert model.pfns(GFN, PAGES) == NOTHING


@pytest.mark.parametrize("kind", RegionKind)
async def test_h4_no_slat_entry_of_the_old_frames_is_left_when_begin_is_answered(
    model: ModelPartition, kind: RegionKind
) -> None:
    await with_all_mapped(model, kind)
    await model.begin(PAGE + 4, 4)
    assert model.pfns(GFN, PAGES) == [*OLD[:4], None, None, None, None, *OLD[8:]]


@pytest.mark.parametrize("point", [Point.UNMAP, Point.UNMAPPED])
async def test_h4_nothing_is_acknowledged_during_the_unmap_call(
    model: ModelPartition, nursery: trio.Nursery, point: Point
) -> None:
    await with_all_mapped(model, RegionKind.MMIO)
    gate = model.gates.hold(point)
    begin = Running(nursery, model.begin, PAGE, PAGES)
    await gate.wait_reached()
    await wait_all_tasks_blocked()
    assert not begin.done
    gate.open()
    await begin.result()


async def test_h4_an_invalidation_reaches_every_alias_of_the_memory(model: ModelPartition) -> None:
    await with_all_mapped(model, RegionKind.MMIO)
    await model.add_region(0x200, 4, PAGE + 2, RegionKind.MOVABLE)
    await model.fault(0x200)
    await model.unmap_vma(PAGE, PAGES)
    assert (model.pfns(GFN, PAGES), model.pfns(0x200, 4)) == (NOTHING, [None] * 4)


async def test_h4_movable_memory_that_went_is_back_to_no_access(model: ModelPartition) -> None:
    await with_all_mapped(model, RegionKind.MOVABLE)
    await model.unmap_vma(PAGE, 4)
    assert model.hypervisor.counters().no_access_gfns == 4


async def test_h3_mmio_whose_vma_was_unmapped_is_forwarded_to_the_vmm(model: ModelPartition) -> None:
    """H3: the region stays, and nothing is mapped from it."""
    await with_all_mapped(model, RegionKind.MMIO)
    await model.unmap_vma(PAGE, PAGES)
    assert await model.fault(GFN) is Answer.UNBACKED
    assert model.pfns(GFN, PAGES) == NOTHING


async def test_h3_mmio_whose_vma_came_back_is_mapped_to_the_new_frames(model: ModelPartition) -> None:
    await with_all_mapped(model, RegionKind.MMIO)
    await model.unmap_vma(PAGE, PAGES)
    await model.map_vma(PAGE, PAGES, NEW_PFN)
    assert await model.fault(GFN + 3) is Answer.MAPPED
    assert model.pfns(GFN, PAGES) == NEW


async def test_h3_a_pinned_region_whose_memory_was_unmapped_dangles_and_is_never_mapped_again(
    model: ModelPartition,
) -> None:
    """H3: the VMM broke its promise; what is behind the uaddrs now was never promised."""
    await with_all_mapped(model, RegionKind.PINNED)
    await model.unmap_vma(PAGE, PAGES)
    await model.map_vma(PAGE, PAGES, NEW_PFN)
    assert await model.fault(GFN) is Answer.UNBACKED
    assert model.pfns(GFN, PAGES) == NOTHING


async def test_h3_a_dangling_region_is_reported_once_and_can_be_removed(model: ModelPartition) -> None:
    await with_all_mapped(model, RegionKind.PINNED)
    with capture_logs() as logs:
        await model.unmap_vma(PAGE, 4)
        await model.unmap_vma(PAGE + 4, 4)
    [region] = model.regions.first_regions(1)
    assert region.state is RegionState.DANGLING
    assert [entry["event"] for entry in logs if entry["log_level"] == "warning"] == ["pinned_region_dangling"]
    await model.remove_region(GFN, PAGES, PAGE)
    assert model.pfns(GFN, PAGES) == NOTHING


async def test_e_a_frame_that_went_after_it_was_looked_up_is_not_mapped(
    model: ModelPartition, nursery: trio.Nursery
) -> None:
    """e: the frame is used only if no invalidation came between its look-up and the map."""
    await model.map_vma(PAGE, PAGES, PFN)
    await model.add_region(GFN, PAGES, PAGE)
    gate = model.gates.hold(Point.RESOLVED)
    fault = Running(nursery, model.fault, GFN)
    await gate.wait_reached()
    await model.unmap_vma(PAGE, PAGES)
    await model.map_vma(PAGE, PAGES, NEW_PFN)
    gate.open()
    assert await fault.result() is Answer.MAPPED
    assert model.pfns(GFN, PAGES) == NEW


async def test_e_a_frame_that_went_while_the_commit_waited_for_the_lock_is_not_mapped(
    model: ModelPartition, nursery: trio.Nursery
) -> None:
    """e: the check is made under the lock, right before the map."""
    await model.map_vma(PAGE, PAGES, PFN)
    await model.add_region(GFN, PAGES, PAGE)
    await model.map_vma(0xA000, 1, 0x6000)
    await model.add_region(0x200, 1, 0xA000)
    holder = model.gates.hold(Point.MAP)
    other = Running(nursery, model.fault, 0x200)
    await holder.wait_reached()
    fault = Running(nursery, model.fault, GFN)
    await wait_all_tasks_blocked()
    unmap = Running(nursery, model.unmap_vma, PAGE, PAGES)
    await wait_all_tasks_blocked()
    holder.open()
    await unmap.result()
    assert await fault.result() is Answer.UNBACKED
    assert await other.result() is Answer.MAPPED
    assert model.pfns(GFN, PAGES) == NOTHING


async def test_e_a_right_that_went_after_it_was_looked_up_is_not_given(
    model: ModelPartition, nursery: trio.Nursery
) -> None:
    await model.map_vma(PAGE, PAGES, PFN)
    await model.add_region(GFN, PAGES, PAGE)
    gate = model.gates.hold(Point.RESOLVED)
    fault = Running(nursery, model.fault, GFN, Access.WRITE)
    await gate.wait_reached()
    await model.protect_vma(PAGE, PAGES, Access.READ)
    gate.open()
    assert await fault.result() is Answer.PERMISSION


@pytest.mark.parametrize("kind", RegionKind)
async def test_k_a_remove_is_answered_after_everything_is_unmapped(
    model: ModelPartition, kind: RegionKind
) -> None:
    """k: mshv never unmapped an MMIO region before the partition was finalised."""
    await with_all_mapped(model, kind)
    await model.remove_region(GFN, PAGES, PAGE)
    assert model.hypervisor.counters().slat_extents == 0


async def test_k_a_part_of_the_memory_that_went_is_unmapped_and_only_that(model: ModelPartition) -> None:
    await with_all_mapped(model, RegionKind.MMIO)
    await model.unmap_vma(PAGE + 3, 2)
    assert model.pfns(GFN, PAGES) == [*OLD[:3], None, None, *OLD[5:]]


async def test_k_rights_that_went_are_taken_from_the_guest(model: ModelPartition) -> None:
    await with_all_mapped(model, RegionKind.MMIO)
    await model.protect_vma(PAGE, PAGES, Access.READ)
    assert await model.fault(GFN, Access.WRITE) is Answer.PERMISSION
    assert await model.fault(GFN, Access.READ) is Answer.MAPPED


async def test_k_the_end_of_the_regions_leaves_an_empty_slat(model: ModelPartition) -> None:
    await with_all_mapped(model, RegionKind.MMIO)
    await model.add_region(0x200, 4, PAGE + 2, RegionKind.MOVABLE)
    await model.regions.close()
    counters = model.hypervisor.counters()
    assert (counters.slat_extents, model.regions.region_count) == (0, 0)
