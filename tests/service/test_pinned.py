"""Adding a pinned region: one attempt populates it completely, or nothing of it remains."""

from __future__ import annotations

import errno

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from explorer.model_partition import addition
from explorer.pauses import Point
from explorer.ports import Mapped
from fakes.model_partition import RW, ModelPartition
from fakes.one_region import GFN, PAGE, PAGES, PFN
from fakes.running import Running
from fakes.used_up_time import time_used_up_every
from intercept_protocol.addresses import UaddrRange
from intercept_protocol.errors import WireError
from intercept_protocol.messages import RegionKind
from intercept_protocol.outcomes import Access, Answer
from interceptd.memory import long_lists
from interceptd.memory.region import RegionState

NOTHING = [None] * PAGES


async def test_add_pinned_is_not_live_while_it_is_populated(
    model: ModelPartition, nursery: trio.Nursery
) -> None:
    """The answer to a fault is retry, not unbacked."""
    await model.map_vma(PAGE, PAGES, PFN)
    gate = model.gates.hold(Point.RESOLVE)
    add = Running(nursery, model.add_region, GFN, PAGES, PAGE, RegionKind.PINNED)
    await gate.wait_reached()
    assert await model.fault(GFN) is Answer.CONTENDED
    gate.open()
    assert await add.result() is RegionKind.PINNED
    assert await model.fault(GFN) is Answer.ALREADY_MAPPED
    assert model.hypervisor.events == [Mapped(GFN, GFN + PAGES, PFN, RW)]


@pytest.mark.parametrize("point", [Point.RESOLVE, Point.RESOLVED, Point.MAP, Point.MAPPED])
async def test_add_pinned_with_an_invalidation_meanwhile_is_efault_and_leaves_nothing(
    model: ModelPartition, nursery: trio.Nursery, point: Point
) -> None:
    await model.map_vma(PAGE, PAGES, PFN)
    gate = model.gates.hold(point)
    add = Running(nursery, model.add_region, GFN, PAGES, PAGE, RegionKind.PINNED)
    await gate.wait_reached()
    invalidate = Running(nursery, model.invalidate, PAGE + 15, 1)
    await wait_all_tasks_blocked()
    gate.open()
    with pytest.raises(WireError, match="was invalidated meanwhile") as refused:
        await add.result()
    assert refused.value.number == errno.EFAULT
    await invalidate.result()
    assert (model.regions.region_count, model.pfns(GFN, PAGES)) == (0, NOTHING)
    assert await model.fault(GFN) is Answer.NO_REGION


async def test_add_pinned_during_a_pass_is_populated_after_it_and_not_accused(
    model: ModelPartition, nursery: trio.Nursery
) -> None:
    """The pass to come would accuse a region of what happened before it was there."""
    await model.map_vma(PAGE, PAGES, PFN)
    await model.add_region(GFN + PAGES, PAGES, PAGE, RegionKind.MMIO)
    await model.fault(GFN + PAGES)
    gate = model.gates.hold(Point.UNMAP)
    invalidate = Running(nursery, model.invalidate, PAGE, PAGES)
    await gate.wait_reached()
    add = Running(nursery, model.add_region, GFN, PAGES, PAGE, RegionKind.PINNED)
    await wait_all_tasks_blocked()
    gate.open()
    await invalidate.result()
    assert await add.result() is RegionKind.PINNED
    assert await model.fault(GFN) is Answer.ALREADY_MAPPED


async def test_a_pinned_region_outlives_more_invalidations_elsewhere_than_are_kept_apart(
    model: ModelPartition, nursery: trio.Nursery
) -> None:
    """Over 1,024 pieces "everything" is invalidated: no proof against a region that none of them hit."""
    await model.map_vma(PAGE, PAGES, PFN)
    await model.add_region(GFN, PAGES, PAGE, RegionKind.PINNED)
    await model.map_vma(1 << 20, 1, PFN + PAGES)
    await model.add_region(1 << 20, 1, 1 << 20, RegionKind.MMIO)
    await model.fault(1 << 20)
    gate = model.gates.hold(Point.UNMAP)
    first = Running(nursery, model.invalidate, 1 << 20, 1)
    await gate.wait_reached()
    for piece in range(1100):
        model.notifier.invalidate(UaddrRange(start=(1 << 21) + 2 * piece, end=(1 << 21) + 2 * piece + 1))
    gate.open()
    await first.result()
    await model.invalidate(1 << 22, 1)
    assert await model.fault(GFN) is Answer.MAPPED


async def test_add_pinned_inside_an_open_invalidation_is_efault_and_leaves_nothing(
    model: ModelPartition,
) -> None:
    await model.map_vma(PAGE, PAGES, PFN)
    await model.begin(PAGE + 3, 1)
    with pytest.raises(WireError, match="is being invalidated") as refused:
        await model.add_region(GFN, PAGES, PAGE, RegionKind.PINNED)
    assert refused.value.number == errno.EFAULT
    assert model.regions.region_count == 0


@pytest.mark.parametrize(("backed", "access"), [(15, RW), (16, Access.WRITE)])
async def test_add_pinned_that_cannot_be_fully_populated_is_efault_and_leaves_nothing(
    model: ModelPartition, backed: int, access: Access
) -> None:
    await model.map_vma(PAGE, backed, PFN, access)
    with pytest.raises(WireError) as refused:
        await model.add_region(GFN, PAGES, PAGE, RegionKind.PINNED)
    assert refused.value.number == errno.EFAULT
    assert (model.regions.region_count, model.pfns(GFN, PAGES)) == (0, NOTHING)


async def test_add_pinned_that_the_hypervisor_refuses_half_way_leaves_nothing(model: ModelPartition) -> None:
    await model.map_vma(PAGE, 8, PFN)
    await model.map_vma(PAGE + 8, 8, 0xB000)
    model.hypervisor.refuse_map(nth=2)
    with pytest.raises(WireError, match="the hypervisor refused") as refused:
        await model.add_region(GFN, PAGES, PAGE, RegionKind.PINNED)
    assert refused.value.number == errno.EFAULT
    assert (model.regions.region_count, model.pfns(GFN, PAGES)) == (0, NOTHING)


async def test_a_cancelled_add_pinned_leaves_nothing(model: ModelPartition, nursery: trio.Nursery) -> None:
    await model.map_vma(PAGE, PAGES, PFN)
    gate = model.gates.hold(Point.RESOLVED)
    add = Running(nursery, model.add_region, GFN, PAGES, PAGE, RegionKind.PINNED)
    await gate.wait_reached()
    assert await add.cancel()
    assert (model.regions.region_count, model.pfns(GFN, PAGES)) == (0, NOTHING)


async def test_an_add_pinned_cancelled_while_waiting_for_the_lock_leaves_nothing(
    model: ModelPartition, nursery: trio.Nursery
) -> None:
    await model.map_vma(PAGE, 2 * PAGES, PFN)
    await model.add_region(GFN + PAGES, PAGES, PAGE + PAGES)
    resolving = model.gates.hold(Point.RESOLVE)
    add = Running(nursery, model.add_region, GFN, PAGES, PAGE, RegionKind.PINNED)
    await resolving.wait_reached()
    mapping = model.gates.hold(Point.MAP)
    fault = Running(nursery, model.fault, GFN + PAGES)
    await mapping.wait_reached()
    resolving.open()
    await wait_all_tasks_blocked()
    given_up = Running(nursery, add.cancel)
    await wait_all_tasks_blocked()
    mapping.open()
    assert (await given_up.result(), await fault.result()) == (True, Answer.MAPPED)
    assert model.regions.lookup(GFN, Access.READ) is Answer.NO_REGION


@pytest.mark.parametrize("how", ["added", "changed to"])
async def test_behind_the_step_in_which_a_pinned_region_is_live_nothing_waits(
    model: ModelPartition, nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """Its request is recorded for a successor when it is complete: what is recorded of the region before that
    would be of a region that nobody knows."""
    monkeypatch.setattr(long_lists, "PART", 1)
    for page in range(16):
        await model.map_vma(page, 1, 2 * page)
    asked = True

    async def watch() -> None:
        while asked:
            regions = model.regions.first_regions(1)
            live_and_free = regions and regions[0].state is RegionState.LIVE and not model.regions.busy
            assert not live_and_free, "it could be invalidated now, and be dangling"
            await trio.lowlevel.checkpoint()

    nursery.start_soon(watch)
    with time_used_up_every(1):
        if how == "added":
            await model.add_region(0, 16, 0, RegionKind.PINNED)
        else:
            await model.change_regions([], [addition(0, 16, 0, RegionKind.PINNED)])
    asked = False
    assert model.regions.first_regions(1)[0].state is RegionState.LIVE
