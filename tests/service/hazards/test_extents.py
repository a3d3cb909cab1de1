"""Hazards of which pages are mapped, and how many: a, f, i, j and q of the review."""

from __future__ import annotations

import errno

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st
from trio.testing import MockClock

from explorer.pauses import Point
from explorer.ports import Mapped
from fakes.model_partition import RW, ModelPartition
from fakes.running import Running
from fakes.used_up_time import time_used_up_every
from intercept_protocol.addresses import PAGE_LIMIT, RangeError, UaddrRange
from intercept_protocol.errors import WireError
from intercept_protocol.messages import MmioGranularity, RegionKind
from intercept_protocol.outcomes import Answer

GFN, PAGE, PFN, PAGES = 0x103, 0x9000, 0x7000, 16
BAR_PAGES = (64 << 30) >> 12
"""64 GiB."""


# ------------------------------------------------ a: the base frame


@pytest.mark.parametrize("k", [0, 1, 7, PAGES - 1])
async def test_a_a_fault_on_page_k_maps_the_whole_region_with_page_k_at_frame_k(
    model: ModelPartition, k: int
) -> None:
    """a: the patch subtracted the fault's offset after overwriting it, so all pages were k too high."""
    await model.map_vma(PAGE, PAGES, PFN)
    await model.add_region(GFN, PAGES, PAGE)
    await model.fault(GFN + k)
    assert model.hypervisor.events == [Mapped(GFN, GFN + PAGES, PFN, RW)]
    assert model.pfns(GFN - 1, PAGES + 2) == [None, *range(PFN, PFN + PAGES), None]


@pytest.mark.parametrize("k", [0, 7, PAGES - 1])
async def test_a_a_fault_on_page_k_with_page_granularity_maps_frame_k_alone(
    model: ModelPartition, k: int
) -> None:
    model.regions.mmio_granularity = MmioGranularity.PAGE
    await model.map_vma(PAGE, PAGES, PFN)
    await model.add_region(GFN, PAGES, PAGE)
    await model.fault(GFN + k)
    assert model.hypervisor.events == [Mapped(GFN + k, GFN + k + 1, PFN + k, RW)]


async def test_a_a_region_in_the_middle_of_a_vma_starts_at_the_frame_of_its_own_start(
    model: ModelPartition,
) -> None:
    """a: uaddr - vm_start counts as well."""
    await model.map_vma(PAGE - 5, PAGES + 10, PFN - 5)
    await model.add_region(GFN, PAGES, PAGE)
    await model.fault(GFN + 9)
    assert model.hypervisor.events == [Mapped(GFN, GFN + PAGES, PFN, RW)]


# ------------------------------------------------ f: no extrapolation


async def test_f_a_region_over_two_vmas_with_a_hole_maps_each_run_and_forwards_the_hole(
    model: ModelPartition,
) -> None:
    """f: an MSI-X page is left unmapped so that it traps; one frame must not cover the whole region."""
    await model.map_vma(PAGE, 6, PFN)
    await model.map_vma(PAGE + 7, 9, 0xB000)
    await model.add_region(GFN, PAGES, PAGE)
    assert await model.fault(GFN + 4) is Answer.MAPPED
    assert await model.fault(GFN + 6) is Answer.UNBACKED
    assert await model.fault(GFN + 10) is Answer.MAPPED
    assert model.hypervisor.events == [Mapped(GFN, GFN + 6, PFN, RW), Mapped(GFN + 7, GFN + 16, 0xB000, RW)]
    assert model.pfns(GFN, PAGES) == [*range(PFN, PFN + 6), None, *range(0xB000, 0xB009)]


async def test_f_a_vma_longer_than_the_region_is_mapped_no_further_than_the_region(
    model: ModelPartition,
) -> None:
    await model.map_vma(PAGE, 100, PFN)
    await model.add_region(GFN, 4, PAGE + 2)
    await model.fault(GFN)
    assert model.hypervisor.events == [Mapped(GFN, GFN + 4, PFN + 2, RW)]


async def test_f_neighbouring_vmas_of_other_frames_are_mapped_apart(model: ModelPartition) -> None:
    await model.map_vma(PAGE, 8, PFN)
    await model.map_vma(PAGE + 8, 8, 0xB000)
    await model.add_region(GFN, PAGES, PAGE)
    await model.fault(GFN + 8)
    assert model.pfns(GFN, PAGES) == [None] * 8 + [*range(0xB000, 0xB008)]


async def test_f_a_pinned_region_over_two_vmas_is_populated_from_both(model: ModelPartition) -> None:
    await model.map_vma(PAGE, 8, PFN)
    await model.map_vma(PAGE + 8, 8, 0xB000)
    await model.add_region(GFN, PAGES, PAGE, RegionKind.PINNED)
    assert model.pfns(GFN, PAGES) == [*range(PFN, PFN + 8), *range(0xB000, 0xB008)]


# ------------------------------------------------ i: overflow


@pytest.mark.parametrize(
    ("gfn", "page_count", "page", "field"),
    [
        (PAGE_LIMIT, 1, PAGE, "start_gfn"),
        (PAGE_LIMIT - 1, 2, PAGE, "page_count"),
        (GFN, (1 << 64) - 1, PAGE, "page_count"),
        (GFN, 2, PAGE_LIMIT - 1, "page_count"),
        (GFN, 0, PAGE, "page_count"),
    ],
)
async def test_i_a_region_that_would_wrap_is_refused_by_the_field(
    model: ModelPartition, gfn: int, page_count: int, page: int, field: str
) -> None:
    """i: start + count was never checked."""
    with pytest.raises(RangeError) as refused:
        await model.add_region(gfn, page_count, page)
    assert refused.value.field == field
    assert model.regions.region_count == 0


@pytest.mark.parametrize(
    ("pfn", "page_count", "field"), [(PAGE_LIMIT, 1, "start_pfn"), (PAGE_LIMIT - 1, 2, "page_count")]
)
async def test_i_a_vma_whose_frames_would_wrap_is_refused_by_the_field(
    model: ModelPartition, pfn: int, page_count: int, field: str
) -> None:
    with pytest.raises(RangeError) as refused:
        await model.map_vma(PAGE, page_count, pfn)
    assert refused.value.field == field


async def test_i_a_region_below_its_frames_number_does_not_underflow(model: ModelPartition) -> None:
    """i: pfn - offset went below zero where the frame's number is smaller than the offset."""
    await model.map_vma(0, PAGES, 0)
    await model.add_region(PAGE_LIMIT - PAGES, PAGES, 0)
    assert await model.fault(PAGE_LIMIT - 1) is Answer.MAPPED
    assert model.pfns(PAGE_LIMIT - PAGES, PAGES) == [*range(PAGES)]


# ------------------------------------------------ j: whose memory


async def test_j_each_partition_resolves_in_the_address_space_of_its_vmm() -> None:
    """j: the patch looked into the mm of the process that ran the VP."""
    async with ModelPartition().running() as ours, ModelPartition(partition_id=2).running() as theirs:
        for model, pfn in ((ours, PFN), (theirs, 0xB000)):
            await model.map_vma(PAGE, PAGES, pfn)
            await model.add_region(GFN, PAGES, PAGE)
            await model.fault(GFN)
        assert (ours.pfn(GFN), theirs.pfn(GFN)) == (PFN, 0xB000)
        await theirs.unmap_vma(PAGE, PAGES)
        assert (ours.pfn(GFN), theirs.pfn(GFN)) == (PFN, None)


# ------------------------------------------------ q: huge BARs


async def test_q_a_64_gib_bar_is_mapped_on_first_touch_in_one_request_of_counted_calls(
    model: ModelPartition,
) -> None:
    """q: what is proportional to the pages is arithmetic, not a loop."""
    await model.map_vma(PAGE, BAR_PAGES, PFN)
    await model.add_region(GFN, BAR_PAGES, PAGE)
    assert await model.fault(GFN + 12345) is Answer.MAPPED
    counters = model.hypervisor.counters()
    assert model.hypervisor.events == [Mapped(GFN, GFN + BAR_PAGES, PFN, RW)]
    assert (counters.map_calls, counters.slat_extents) == (-(-BAR_PAGES // 509), 1)


async def test_q_other_vps_are_answered_while_a_64_gib_bar_is_mapped(
    model: ModelPartition, nursery: trio.Nursery
) -> None:
    """q: a look-up needs no lock, so only those who change something wait."""
    await model.map_vma(PAGE - 1, 1, 0x6000)
    await model.add_region(GFN - 1, 1, PAGE - 1)
    await model.fault(GFN - 1)
    await model.map_vma(PAGE, BAR_PAGES, PFN)
    await model.add_region(GFN, BAR_PAGES, PAGE)
    gate = model.gates.hold(Point.MAP)
    bar = Running(nursery, model.fault, GFN)
    await gate.wait_reached()
    with trio.fail_after(1):
        answers = [await model.fault(GFN - 1), await model.fault(1)]
    assert answers == [Answer.ALREADY_MAPPED, Answer.NO_REGION]
    gate.open()
    assert await bar.result() is Answer.MAPPED


QUESTIONS = 32
"""After so many pieces the time is used up."""


class Turns:
    """Counts how often another partition's task gets to run."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self.taken = 0
        nursery.start_soon(self._run)

    async def _run(self) -> None:
        while True:
            self.taken += 1
            await trio.lowlevel.checkpoint()


async def test_q_an_invalidation_of_many_regions_yields_to_other_partitions(
    model: ModelPartition, nursery: trio.Nursery
) -> None:
    many = 8 * QUESTIONS
    await model.map_vma(PAGE, many, PFN)
    for region in range(many):
        await model.add_region(region, 1, PAGE + region)
    turns = Turns(nursery)
    with time_used_up_every(QUESTIONS):
        model.notifier.invalidate(UaddrRange.at_page(PAGE, many))
        await model.regions.serve_pending()
    assert turns.taken >= 6, "eight parts, between which trio draws who is first"


async def test_q_a_pinned_region_over_many_vmas_always_yields_to_other_partitions(
    model: ModelPartition, nursery: trio.Nursery
) -> None:
    """q: a million VMAs in one region took the daemon minutes at a stretch."""
    many = 8 * QUESTIONS
    for page in range(many):
        await model.map_vma(page, 1, 2 * page)
    turns = [Turns(nursery) for _ in range(3)]
    with time_used_up_every(2):  # it asks after each part
        await model.add_region(0, many, 0, RegionKind.PINNED)
        added, turns[1].taken = turns[0].taken, 0
        await model.remove_region(0, many, 0)
        removed = turns[1].taken
        await model.add_region(0, many, 0, RegionKind.PINNED)
        turns[2].taken = 0
        model.notifier.invalidate(UaddrRange.at_page(0, many))
        await model.regions.serve_pending()
    assert (added >= 12, removed >= 6, turns[2].taken >= 6) == (True, True, True)
    assert model.pfns(0, many) == [None] * many


@given(st.integers(1, 3000))
def test_q_map_calls_are_those_of_the_batches_whatever_the_length(page_count: int) -> None:
    async def main() -> int:
        async with ModelPartition().running() as model:
            await model.map_vma(PAGE, page_count, PFN)
            await model.add_region(GFN, page_count, PAGE)
            await model.fault(GFN)
            return model.hypervisor.counters().map_calls

    assert trio.run(main, clock=MockClock(autojump_threshold=0)) == -(-page_count // 509)


# ------------------------------------------------ the address space's word


async def test_a_region_of_kind_auto_over_no_vma_is_einval(model: ModelPartition) -> None:
    with pytest.raises(WireError, match="no VMA at start_uaddr") as refused:
        await model.add_region(GFN, PAGES, PAGE, kind=None)
    assert (refused.value.number, refused.value.details) == (errno.EINVAL, {"field": "start_uaddr"})


@pytest.mark.parametrize(("io", "kind"), [(True, RegionKind.MMIO), (False, RegionKind.MOVABLE)])
async def test_a_region_of_kind_auto_gets_the_kind_of_its_vma(
    model: ModelPartition, kind: RegionKind, *, io: bool
) -> None:
    await model.map_vma(PAGE, PAGES, PFN, io=io)
    assert await model.add_region(GFN, PAGES, PAGE, kind=None) is kind


async def test_a_region_of_kind_auto_whose_vma_changed_its_kind_is_unbacked(model: ModelPartition) -> None:
    await model.map_vma(PAGE, PAGES, PFN, io=True)
    await model.add_region(GFN, PAGES, PAGE, kind=None)
    await model.unmap_vma(PAGE, PAGES)
    await model.map_vma(PAGE, PAGES, PFN, io=False)
    assert await model.fault(GFN) is Answer.UNBACKED
