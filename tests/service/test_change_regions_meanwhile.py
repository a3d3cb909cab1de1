"""An atomic change of regions: faults and invalidations that come while it goes on."""

from __future__ import annotations

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from explorer.model_partition import addition, removal
from explorer.pauses import Point
from fakes.counted_bounds import Counted
from fakes.model_partition import RW, ModelPartition
from fakes.one_region import GFN, PAGE, PAGES, with_region
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
from intercept_protocol.addresses import UaddrRange
from intercept_protocol.errors import WireError
from intercept_protocol.messages import RegionKind
from intercept_protocol.messages.vmm import LIST_LIMIT
from intercept_protocol.outcomes import Access, Answer
from interceptd.memory.attempt import Busy
from interceptd.pages.mapping import Mapping


@KINDS
@pytest.mark.parametrize("point", [Point.UNMAP, Point.UNMAPPED])
async def test_a_fault_on_what_changes_waits_and_is_answered_for_the_new_region(
    model: ModelPartition, nursery: trio.Nursery, kind: RegionKind, point: Point
) -> None:
    """Where the old region is being taken away."""
    await with_mapped(model, kind)
    gate = model.gates.hold(point)
    change = Running(nursery, model.change_regions, [THE_REGION], [addition(GFN, PAGES, ROM, kind)])
    await gate.wait_reached()
    fault = Running(nursery, model.fault, GFN + 1)
    await wait_all_tasks_blocked()
    assert not fault.done
    gate.open()
    await change.result()
    assert await fault.result() in SERVED
    assert model.pfn(GFN + 1) == ROM_PFN + 1


async def test_faults_on_all_that_changes_wait_while_one_piece_goes_after_the_other(
    model: ModelPartition, nursery: trio.Nursery
) -> None:
    """Those on what is gone already, and those on what is still mapped."""
    await with_mapped(model)
    await model.add_region(ELSEWHERE, PAGES, ROM)
    await model.fault(ELSEWHERE)
    gates = [model.gates.hold(Point.UNMAPPED) for _ in range(2)]
    swap = [addition(GFN, PAGES, ROM), addition(ELSEWHERE, PAGES, PAGE)]
    change = Running(nursery, model.change_regions, [THE_REGION, removal(ELSEWHERE, PAGES, ROM)], swap)
    faults = []
    for gate in gates:
        await gate.wait_reached()
        faults += [Running(nursery, model.fault, gfn) for gfn in (GFN, ELSEWHERE)]
        await wait_all_tasks_blocked()
        assert not any(fault.done for fault in faults)
        assert [isinstance(model.regions.lookup(gfn, RW), Busy) for gfn in (GFN, ELSEWHERE)] == [True, True]
        gate.open()
    await change.result()
    assert [await fault.result() in SERVED for fault in faults] == [True] * 4


@pytest.mark.parametrize("kind", [RegionKind.MOVABLE, RegionKind.PINNED])
@pytest.mark.parametrize("point", [Point.MAP, Point.MAPPED])
async def test_a_fault_waits_until_what_the_new_region_needs_is_mapped(
    model: ModelPartition, nursery: trio.Nursery, kind: RegionKind, point: Point
) -> None:
    await with_mapped(model, kind)
    gate = model.gates.hold(point)
    change = Running(nursery, model.change_regions, [THE_REGION], [addition(GFN, PAGES, ROM, kind)])
    await gate.wait_reached()
    faults = [Running(nursery, model.fault, gfn) for gfn in (GFN, GFN + PAGES - 1)]
    await wait_all_tasks_blocked()
    assert [fault.done for fault in faults] == [False, False]
    gate.open()
    await change.result()
    assert [await fault.result() in SERVED for fault in faults] == [True, True]
    assert model.pfns(GFN, PAGES) == SHADOW


async def test_what_is_kept_is_served_all_the_time(model: ModelPartition, nursery: trio.Nursery) -> None:
    await with_mapped(model)
    gates = [model.gates.hold(point) for point in (Point.UNMAP, Point.MAP)]
    around = [addition(GFN, 4, PAGE), addition(GFN + 4, PAGES - 4, ROM, RegionKind.MOVABLE)]
    change = Running(nursery, model.change_regions, [THE_REGION], around)
    for gate in gates:
        await gate.wait_reached()
        assert [isinstance(model.regions.lookup(GFN + page, Access.READ), Mapping) for page in range(5)] == [
            *[True] * 4,
            False,
        ]
        gate.open()
    await change.result()


async def test_a_fault_in_what_is_kept_that_was_in_flight_is_served_by_the_new_region(
    model: ModelPartition, nursery: trio.Nursery
) -> None:
    """It began with the old one, of which nothing may be mapped any more."""
    await with_region(model)
    gate = model.gates.hold(Point.RESOLVED)
    fault = Running(nursery, model.fault, GFN)
    await gate.wait_reached()
    await model.change_regions([THE_REGION], [addition(GFN, 4, PAGE)])
    gate.open()
    assert await fault.result() is Answer.MAPPED
    assert model.pfns(GFN, PAGES) == [*MEMORY[:4], *NOTHING[4:]]
    assert is_consistent(model)


async def test_a_fault_in_flight_in_a_region_that_is_taken_back_is_served_by_the_old_one(
    model: ModelPartition, nursery: trio.Nursery
) -> None:
    await with_region(model)
    at_map, at_resolve = model.gates.hold(Point.MAP), model.gates.hold(Point.RESOLVED)
    model.hypervisor.refuse_map()
    around = [addition(GFN, 4, PAGE), addition(ELSEWHERE, PAGES, ROM, RegionKind.MOVABLE)]
    change = Running(nursery, model.change_regions, [THE_REGION], around)
    await at_map.wait_reached()
    fault = Running(nursery, model.fault, GFN)
    await at_resolve.wait_reached()
    at_map.open()
    with pytest.raises(WireError):
        await change.result()
    at_resolve.open()
    assert await fault.result() is Answer.MAPPED
    assert model.pfns(GFN, PAGES) == MEMORY
    assert is_consistent(model)


async def test_an_invalidation_of_what_is_kept_is_served_after_the_change(
    model: ModelPartition, nursery: trio.Nursery
) -> None:
    await with_mapped(model)
    gate = model.gates.hold(Point.UNMAP)
    change = Running(nursery, model.change_regions, [THE_REGION], [addition(GFN, 4, PAGE)])
    await gate.wait_reached()
    invalidation = Running(nursery, model.invalidate, PAGE, 1)
    await wait_all_tasks_blocked()
    assert not invalidation.done
    gate.open()
    await change.result()
    await invalidation.result()
    assert model.pfns(GFN, PAGES) == [None, *MEMORY[1:4], *NOTHING[4:]]
    assert is_consistent(model)


async def test_a_change_of_many_regions_does_not_compare_each_with_each_attempt(
    model: ModelPartition,
) -> None:
    """256 VPs may be in flight. It took 5 ms."""
    places = range(0, 2 * LIST_LIMIT, 2)
    await model.change_regions([], [addition(GFN + place, 1, PAGE + place) for place in places])
    attempt = Counted(UaddrRange.at_page(PAGE + LIST_LIMIT + 1, 1))
    model.notifier.open_window(attempt.pages)
    await model.change_regions([removal(GFN + place, 1, PAGE + place) for place in places])
    assert 0 < attempt.looks <= 2 * LIST_LIMIT.bit_length()
