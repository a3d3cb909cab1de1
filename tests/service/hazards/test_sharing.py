"""Hazards of VPs on one extent: H5 and m of the review."""

from __future__ import annotations

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from explorer.pauses import Point
from explorer.ports import Mapped, Unmapped
from fakes.model_partition import RW, ModelPartition
from fakes.one_region import GFN, PAGE, PAGES, PFN, with_region
from fakes.running import Running
from intercept_protocol.messages import MmioGranularity, RegionKind, Remap
from intercept_protocol.outcomes import Answer

VPS = 8


async def with_page_four_mapped(model: ModelPartition) -> None:
    """By page granularity, after which the policy is `vma` again."""
    await with_region(model)
    model.regions.mmio_granularity = MmioGranularity.PAGE
    await model.fault(GFN + 4)
    model.regions.mmio_granularity = MmioGranularity.VMA
    model.hypervisor.events.clear()


@pytest.mark.parametrize("remap", Remap)
async def test_h5_only_the_gaps_are_mapped_where_parts_are_mapped_already(remap: Remap) -> None:
    """H5: the core does not rely on what a hypervisor does when a mapped gpa is mapped."""
    async with ModelPartition(remap=remap).running() as model:
        await with_page_four_mapped(model)
        assert await model.fault(GFN) is Answer.MAPPED
        assert model.hypervisor.events == [
            Mapped(GFN, GFN + 4, PFN, RW),
            Mapped(GFN + 5, GFN + PAGES, PFN + 5, RW),
        ]
        assert model.pfns(GFN, PAGES) == [*range(PFN, PFN + PAGES)]


async def test_h5_movable_memory_is_mapped_over_its_own_no_access_only() -> None:
    async with ModelPartition(remap=Remap.ERROR).running() as model:
        await model.map_vma(PAGE, PAGES, PFN)
        await model.add_region(GFN, PAGES, PAGE, RegionKind.MOVABLE)
        assert await model.fault(GFN) is Answer.MAPPED
        await model.invalidate(PAGE + 4, 2)
        assert await model.fault(GFN + 5) is Answer.MAPPED
        assert model.pfns(GFN, PAGES) == [*range(PFN, PFN + PAGES)]


@pytest.mark.parametrize("point", [Point.RESOLVE, Point.RESOLVED, Point.MAP, Point.MAPPED])
async def test_m_vps_that_fault_on_one_extent_cost_one_map(
    model: ModelPartition, nursery: trio.Nursery, point: Point
) -> None:
    """m: each VP mapped the whole region again."""
    await with_region(model)
    gate = model.gates.hold(point)
    faults = [Running(nursery, model.fault, GFN + vp) for vp in range(VPS)]
    await gate.wait_reached()
    await wait_all_tasks_blocked()
    gate.open()
    answers = [await fault.result() for fault in faults]
    assert sorted(answer.reason for answer in answers) == ["already_mapped"] * (VPS - 1) + ["mapped"]
    assert model.hypervisor.events == [Mapped(GFN, GFN + PAGES, PFN, RW)]


async def test_m_a_failure_undoes_only_what_its_own_call_mapped(model: ModelPartition) -> None:
    """m: a failing VP's roll-back took away what another had just mapped."""
    await with_page_four_mapped(model)
    model.hypervisor.refuse_map(nth=2)
    assert await model.fault(GFN) is Answer.HYPERVISOR_ERROR
    assert model.hypervisor.events == [
        Mapped(GFN, GFN + 4, PFN, RW),
        Mapped(GFN + 5, GFN + PAGES, PFN + 5, RW),
        Unmapped(GFN, GFN + 4),
    ]
    assert model.pfns(GFN, PAGES) == [None] * 4 + [PFN + 4] + [None] * 11


async def test_m_a_vp_behind_one_that_failed_maps_for_itself(
    model: ModelPartition, nursery: trio.Nursery
) -> None:
    await with_region(model)
    model.hypervisor.refuse_map()
    gate = model.gates.hold(Point.MAP)
    first = Running(nursery, model.fault, GFN)
    await gate.wait_reached()
    second = Running(nursery, model.fault, GFN + 1)
    await wait_all_tasks_blocked()
    gate.open()
    assert await first.result() is Answer.HYPERVISOR_ERROR
    assert await second.result() is Answer.MAPPED
