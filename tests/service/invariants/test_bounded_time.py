"""I4: an intercept is answered in bounded time, even if each of many calls is slow."""

from __future__ import annotations

import pytest
import trio

from explorer.inspection import misrecorded
from explorer.pauses import Asked, Point
from fakes.model_partition import RW, TIMEOUT, ModelPartition
from intercept_protocol.addresses import UaddrRange
from intercept_protocol.messages import MmioGranularity, RegionKind
from intercept_protocol.outcomes import Access, Answer

GFN, PAGE, PFN, PAGES = 0x100, 0x9000, 0x7000, 40
LOOKED_AT = range(GFN - 1, GFN + PAGES + 1)
A_CALL = 2.0
"""Virtual seconds of each call: within its own deadline."""


class SlowCalls:
    """Every call of the hypervisor takes `A_CALL` once `slow` is set."""

    slow = False

    async def at(self, point: Point, asked: Asked) -> None:  # noqa: ARG002 - all are slow alike
        if self.slow and point in {Point.MAP, Point.UNMAP}:
            await trio.sleep(A_CALL)


async def with_gaps(model: ModelPartition) -> None:
    """Every other page is mapped, so that one fault has twenty gaps to map."""
    await model.map_vma(PAGE, PAGES, PFN)
    await model.add_region(GFN, PAGES, PAGE, RegionKind.MMIO)
    model.regions.mmio_granularity = MmioGranularity.PAGE
    for page in range(0, PAGES, 2):
        await model.fault(GFN + page)
    model.regions.mmio_granularity = MmioGranularity.VMA


@pytest.mark.parametrize(("page", "answers"), [(1, {Answer.MAPPED}), (PAGES - 1, {Answer.CONTENDED})])
async def test_i4_a_fault_with_many_gaps_ends_at_its_deadline_and_keeps_what_is_mapped(
    page: int, answers: set[Answer]
) -> None:
    pauses = SlowCalls()
    async with ModelPartition(pauses=pauses).running() as model:
        await with_gaps(model)
        pauses.slow = True
        started = trio.current_time()
        assert await model.fault(GFN + page) in answers
        assert trio.current_time() - started <= TIMEOUT + A_CALL
        mapped = model.hypervisor.counters().mapped_gfns
        assert (PAGES // 2 < mapped < PAGES, misrecorded(model, LOOKED_AT)) == (True, None)


async def test_i4_a_retried_fault_is_served_eventually() -> None:
    pauses = SlowCalls()
    async with ModelPartition(pauses=pauses).running() as model:
        await with_gaps(model)
        pauses.slow = True
        while (answer := await model.fault(GFN + PAGES - 1)) is Answer.CONTENDED:
            assert misrecorded(model, LOOKED_AT) is None
        assert answer is Answer.MAPPED
        assert model.pfns(GFN, PAGES) == [*range(PFN, PFN + PAGES)]


async def test_i4_a_fault_whose_page_has_too_few_rights_at_its_deadline_is_not_called_mapped() -> None:
    """The VMA was given more rights, unannounced; the gaps beside the page come first and take the time."""
    pauses = SlowCalls()
    async with ModelPartition(pauses=pauses).running() as model:
        await model.map_vma(PAGE, PAGES, PFN, Access.READ)
        await model.add_region(GFN, PAGES, PAGE, RegionKind.MMIO)
        model.regions.mmio_granularity = MmioGranularity.PAGE
        for page in range(0, PAGES, 2):
            await model.fault(GFN + page)
        model.regions.mmio_granularity = MmioGranularity.VMA
        await model.declared.protect_vma(UaddrRange.at_page(PAGE, PAGES), RW)
        pauses.slow = True
        assert await model.fault(GFN, Access.WRITE) is Answer.CONTENDED
        assert misrecorded(model, LOOKED_AT) is None


async def test_i4_the_roll_back_of_a_refusal_ends_at_the_deadline_too() -> None:
    pauses = SlowCalls()
    async with ModelPartition(pauses=pauses).running() as model:
        await with_gaps(model)
        pauses.slow = True
        model.hypervisor.refuse_map(nth=3)
        started = trio.current_time()
        assert await model.fault(GFN + PAGES - 1) is Answer.HYPERVISOR_ERROR
        assert trio.current_time() - started <= TIMEOUT + A_CALL
        assert misrecorded(model, LOOKED_AT) is None


async def test_a_pinned_region_is_mapped_whole_however_long_that_takes() -> None:
    pauses = SlowCalls()
    async with ModelPartition(pauses=pauses).running() as model:
        for page in range(PAGES):
            await model.map_vma(PAGE + page, 1, PFN + 2 * page)
        pauses.slow = True
        await model.add_region(GFN, PAGES, PAGE, RegionKind.PINNED)
        assert model.hypervisor.counters().mapped_gfns == PAGES
