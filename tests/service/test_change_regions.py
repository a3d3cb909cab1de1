"""An atomic change of regions: what the guest reaches afterwards, and what pinned regions need."""

from __future__ import annotations

import errno

import pytest
import trio
from structlog.testing import capture_logs
from trio.testing import wait_all_tasks_blocked

from explorer.model_partition import addition, removal
from explorer.pauses import Point
from explorer.ports import Mapped, Unmapped
from fakes.model_partition import RW, ModelPartition
from fakes.one_region import GFN, PAGE, PAGES, PFN
from fakes.region_changes import (
    ELSEWHERE,
    KINDS,
    MEMORY,
    NOTHING,
    ROM,
    ROM_PFN,
    SERVED,
    SHADOW,
    THE_REGION,
    is_consistent,
    with_mapped,
)
from fakes.running import Running
from intercept_protocol.errors import WireError
from intercept_protocol.messages import RegionKind
from intercept_protocol.outcomes import Access, Answer
from interceptd.memory import fault_handler
from interceptd.memory.region import RegionState

# ------------------------------------------------ afterwards


@KINDS
async def test_a_bar_that_moves_is_reached_at_its_new_place_only(
    model: ModelPartition, kind: RegionKind
) -> None:
    await with_mapped(model, kind)
    assert await model.change_regions([THE_REGION], [addition(ELSEWHERE, PAGES, PAGE, kind)]) == [kind]
    assert model.pfns(GFN, PAGES) == NOTHING
    assert await model.fault(GFN) is Answer.NO_REGION
    assert await model.fault(ELSEWHERE) in SERVED
    assert model.pfns(ELSEWHERE, PAGES) == MEMORY
    assert is_consistent(model)


@KINDS
async def test_a_shadow_is_what_the_guest_reaches_afterwards(model: ModelPartition, kind: RegionKind) -> None:
    await with_mapped(model, kind)
    await model.change_regions([THE_REGION], [addition(GFN, PAGES, ROM, kind)])
    assert await model.fault(GFN) in SERVED
    assert model.pfns(GFN, PAGES) == SHADOW
    assert is_consistent(model)


@KINDS
async def test_two_regions_swap_their_memory(model: ModelPartition, kind: RegionKind) -> None:
    await with_mapped(model, kind)
    await model.add_region(ELSEWHERE, PAGES, ROM, kind)
    await model.change_regions(
        [THE_REGION, removal(ELSEWHERE, PAGES, ROM)],
        [addition(ELSEWHERE, PAGES, PAGE, kind), addition(GFN, PAGES, ROM, kind)],
    )
    assert [await model.fault(gfn) in SERVED for gfn in (GFN, ELSEWHERE)] == [True, True]
    assert (model.pfns(GFN, PAGES), model.pfns(ELSEWHERE, PAGES)) == (SHADOW, MEMORY)
    assert is_consistent(model)


@KINDS
async def test_a_hole_leaves_what_is_mapped_around_it(model: ModelPartition, kind: RegionKind) -> None:
    await with_mapped(model, kind)
    around = [addition(GFN, 4, PAGE, kind), addition(GFN + 6, PAGES - 6, PAGE + 6, kind)]
    await model.change_regions([THE_REGION], around)
    assert model.hypervisor.events == [Unmapped(GFN + 4, GFN + 6)]
    assert model.pfns(GFN, PAGES) == [*MEMORY[:4], None, None, *MEMORY[6:]]
    assert await model.fault(GFN + 4) is Answer.NO_REGION
    assert [region.mapped_gfns for region in model.regions.first_regions(2)] == [4, PAGES - 6]
    assert is_consistent(model)


async def test_a_region_that_grows_keeps_what_is_mapped(model: ModelPartition) -> None:
    await with_mapped(model, RegionKind.MOVABLE)
    await model.map_vma(PAGE + PAGES, 2, PFN + PAGES)
    await model.change_regions([THE_REGION], [addition(GFN, PAGES + 2, PAGE, RegionKind.MOVABLE)])
    assert model.hypervisor.events == [Mapped(GFN + PAGES, GFN + PAGES + 2, None, Access.NONE)]
    assert await model.fault(GFN + PAGES) in SERVED
    assert model.pfns(GFN, PAGES + 2) == [*MEMORY, PFN + PAGES, PFN + PAGES + 1]
    assert is_consistent(model)


async def test_the_same_regions_again_change_nothing_of_what_is_mapped(model: ModelPartition) -> None:
    await with_mapped(model, RegionKind.PINNED)
    await model.change_regions([THE_REGION], [addition(GFN, PAGES, PAGE, RegionKind.PINNED)])
    assert (model.hypervisor.events, model.pfns(GFN, PAGES)) == ([], MEMORY)
    assert is_consistent(model)


async def test_a_change_of_nothing_changes_nothing(model: ModelPartition) -> None:
    await with_mapped(model)
    assert await model.change_regions() == []
    assert (model.hypervisor.events, is_consistent(model)) == ([], True)


async def test_rights_that_are_taken_are_gone_and_those_that_are_given_are_there(
    model: ModelPartition,
) -> None:
    await with_mapped(model)
    await model.change_regions([THE_REGION], [addition(GFN, PAGES, PAGE, access=Access.READ)])
    assert await model.fault(GFN, Access.WRITE) is Answer.PERMISSION
    await model.change_regions([THE_REGION], [addition(GFN, PAGES, PAGE, access=RW)])
    assert await model.fault(GFN, Access.WRITE) in SERVED


async def test_a_dangling_region_is_followed_by_one_that_is_whole(model: ModelPartition) -> None:
    await with_mapped(model, RegionKind.PINNED)
    with capture_logs():
        await model.invalidate(PAGE + 1, 1)
    await model.change_regions([THE_REGION], [addition(GFN, PAGES, PAGE, RegionKind.PINNED)])
    assert model.pfns(GFN, PAGES) == MEMORY
    assert [region.state for region in model.regions.first_regions(1)] == [RegionState.LIVE]
    assert is_consistent(model)


async def test_a_gap_in_what_a_pinned_region_keeps_is_mapped(model: ModelPartition) -> None:
    """An invalidation of everything leaves gaps, which faults would fill."""
    await with_mapped(model, RegionKind.PINNED)
    model.notifier._pending.collapsed = True
    await model.invalidate(PAGE + 1, 1)
    assert model.pfn(GFN + 1) is None
    await model.change_regions([THE_REGION], [addition(GFN, PAGES, PAGE, RegionKind.PINNED)])
    assert model.pfns(GFN, PAGES) == MEMORY
    assert is_consistent(model)


# ------------------------------------------------ pinned regions


async def test_a_pinned_region_that_is_invalidated_before_the_change_is_efault(
    model: ModelPartition, nursery: trio.Nursery
) -> None:
    await with_mapped(model)
    gate = model.gates.hold(Point.RESOLVED)
    add = [addition(ELSEWHERE, 4, PAGE), addition(GFN, PAGES, ROM, RegionKind.PINNED)]
    change = Running(nursery, model.change_regions, [THE_REGION], add)
    await gate.wait_reached()
    await model.invalidate(ROM + 1, 1)
    gate.open()
    with pytest.raises(WireError, match=r"add\[1\]: .* invalidated") as caught:
        await change.result()
    assert (caught.value.number, caught.value.details) == (errno.EFAULT, {"list": "add", "index": 1})
    assert (model.pfns(GFN, PAGES), model.hypervisor.events) == (MEMORY, [])
    assert is_consistent(model)


async def test_a_pinned_region_that_is_invalidated_after_the_change_is_dangling(
    model: ModelPartition, nursery: trio.Nursery
) -> None:
    await with_mapped(model)
    gate = model.gates.hold(Point.UNMAP)
    add = [addition(GFN, PAGES, ROM, RegionKind.PINNED)]
    change = Running(nursery, model.change_regions, [THE_REGION], add)
    await gate.wait_reached()
    with capture_logs():
        invalidation = Running(nursery, model.invalidate, ROM + 1, 1)
        await wait_all_tasks_blocked()
        gate.open()
        assert await change.result() == [RegionKind.PINNED]
        await invalidation.result()
    assert [region.state for region in model.regions.first_regions(1)] == [RegionState.DANGLING]
    assert model.pfns(GFN, 3) == [ROM_PFN, None, ROM_PFN + 2]
    assert is_consistent(model)


async def test_pinned_memory_in_more_pieces_than_one_change_may_pin_is_efault(
    model: ModelPartition, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All regions together: several may be backed by the same VMAs."""
    monkeypatch.setattr(fault_handler, "CHANGED_PIECES", 4)
    for page in range(3):
        await model.map_vma(PAGE + page, 1, PFN + 2 * page)
    once = [addition(GFN, 3, PAGE, RegionKind.PINNED), addition(ELSEWHERE, 1, PAGE, RegionKind.PINNED)]
    with pytest.raises(WireError, match=r"add\[1\]: .* may pin 4 pieces") as caught:
        await model.change_regions([], [once[0], addition(ELSEWHERE, 2, PAGE, RegionKind.PINNED)])
    assert (caught.value.number, model.regions.region_count) == (errno.EFAULT, 0)
    await model.change_regions([], once)
    assert model.hypervisor.counters().mapped_gfns == 4
    assert is_consistent(model)
