"""Prefault: the pages that a guest would have touched, gone through without one, within bounds."""

from __future__ import annotations

import errno

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from explorer.pauses import Point
from explorer.ports import Mapped
from fakes.model_partition import ModelPartition
from fakes.model_vp import attached_vp
from fakes.one_region import GFN, PAGE, PAGES, PFN, with_region
from fakes.running import Running
from intercept_protocol.addresses import PAGE_LIMIT, GfnRange
from intercept_protocol.errors import WireError
from intercept_protocol.messages import MmioGranularity, RegionKind
from intercept_protocol.outcomes import Access, Answer
from interceptd.address_space import Undecided
from interceptd.memory import prefault
from interceptd.memory.fault_handler import UNDECIDED_PAUSE
from interceptd.memory.prefault import SECONDS
from interceptd.memory.region import FAULT_IN_PAGES
from interceptd.partition.progress_guard import REPEATS

EVERYWHERE = (0, PAGE_LIMIT)


def counted(model: ModelPartition, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The gfns that are looked up from now on."""
    lookup, looked_up = model.faults.lookup, list[int]()

    def count(gfn: int, access: Access) -> object:
        looked_up.append(gfn)
        return lookup(gfn, access)

    monkeypatch.setattr(model.faults, "lookup", count)
    return looked_up


# ------------------------------------------------ what is mapped then


@pytest.mark.parametrize("kind", RegionKind)
@pytest.mark.parametrize("granularity", MmioGranularity)
async def test_the_guest_reaches_what_it_would_if_it_had_read_each_page(
    kind: RegionKind, granularity: MmioGranularity
) -> None:
    """Two regions and a gap between them, four VMAs, one that may not be read, and pages without any."""
    seen = []
    for prefaulted in (True, False):
        async with ModelPartition().running() as model:
            model.regions.mmio_granularity = granularity
            for start, rights in ((0, Access.READ), (4, Access.READ | Access.WRITE), (10, Access.READ)):
                await model.map_vma(PAGE + start, 4, PFN + start, rights)
            await model.map_vma(PAGE + 20, 4, PFN + 20, Access.WRITE)
            await model.add_region(GFN, 4 if kind is RegionKind.PINNED else 16, PAGE, kind)
            await model.add_region(GFN + 20, 8, PAGE + 20)
            if prefaulted:
                page_count, mapped = await model.prefault(GFN - 1, 40)
                assert page_count == 40
                assert mapped == model.hypervisor.counters().mapped_gfns
            else:
                for gfn in range(GFN - 1, GFN + 39):
                    await model.fault(gfn)
            mappings = model.regions.first_mappings(100)
            seen.append(mappings)
            assert model.partition.answers.total() == 0
    assert seen[0] == seen[1] != []


async def test_pages_that_nothing_backs_are_passed_over_and_are_no_error(model: ModelPartition) -> None:
    await model.map_vma(PAGE + 5, 2, PFN)
    await model.add_region(GFN, PAGES, PAGE)
    assert await model.prefault(GFN, PAGES) == (PAGES, 2)
    assert model.pfns(GFN + 4, 4) == [None, PFN, PFN + 1, None]


async def test_what_is_mapped_already_counts_and_is_not_mapped_again(model: ModelPartition) -> None:
    await with_region(model)
    await model.fault(GFN)
    maps = len(model.hypervisor.events)
    assert await model.prefault(GFN + 2, PAGES) == (PAGES, PAGES - 2)
    assert len(model.hypervisor.events) == maps


# ------------------------------------------------ what it costs


async def test_whole_mappings_and_what_reaches_to_the_next_region_take_one_look_each(
    model: ModelPartition, monkeypatch: pytest.MonkeyPatch
) -> None:
    await with_region(model)
    await model.map_vma(PAGE + 2 * PAGES, PAGES, PFN)
    await model.add_region(GFN + 2 * PAGES, PAGES, PAGE + 2 * PAGES, RegionKind.PINNED)
    await model.invalidate(PAGE + 2 * PAGES, 1)
    await model.fault(GFN)
    looked_up = counted(model, monkeypatch)
    assert await model.prefault(*EVERYWHERE) == (PAGE_LIMIT, 2 * PAGES - 1)
    pinned = GFN + 2 * PAGES
    assert looked_up == [0, GFN, GFN + PAGES, pinned, pinned + 1, pinned + PAGES]


async def test_one_call_makes_a_bounded_number_of_faults_and_the_next_goes_on_from_there(
    model: ModelPartition, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prefault, "LOOKS", 5)
    await with_region(model)
    model.regions.mmio_granularity = MmioGranularity.PAGE
    assert await model.prefault(GFN, PAGES) == (5, 5)
    assert await model.prefault(GFN + 5, PAGES - 5) == (5, 5)
    assert len(model.hypervisor.events) == 10


async def test_a_call_ends_with_the_fault_in_which_its_time_is_over(
    model: ModelPartition, nursery: trio.Nursery
) -> None:
    await model.map_vma(PAGE, 3 * FAULT_IN_PAGES, PFN)
    await model.add_region(GFN, 3 * FAULT_IN_PAGES, PAGE, RegionKind.MOVABLE)
    gates = [model.gates.hold(Point.MAP) for _ in range(3)]
    call = Running(nursery, model.prefault, GFN, 3 * FAULT_IN_PAGES)
    for gate, seconds in zip(gates, (SECONDS * 0.9, SECONDS * 0.2), strict=False):
        await gate.wait_reached()
        await trio.sleep(seconds)
        gate.open()
    assert await call.result() == (2 * FAULT_IN_PAGES, 2 * FAULT_IN_PAGES)
    assert not gates[2].reached


async def test_pages_that_are_not_decided_are_passed_over_one_by_one(
    model: ModelPartition, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def resolve(*_: object) -> None:
        raise Undecided("the process does not answer")

    model.address_space.may_block = True
    await with_region(model)
    monkeypatch.setattr(model.address_space, "resolve", resolve)
    began = trio.current_time()
    page_count, mapped = await model.prefault(GFN, PAGES)
    assert (page_count, mapped) == (round(SECONDS / UNDECIDED_PAUSE), 0)
    assert trio.current_time() - began == pytest.approx(SECONDS)


# ------------------------------------------------ what happens meanwhile


async def test_it_does_not_wait_for_the_end_of_an_invalidation(model: ModelPartition) -> None:
    """The thread that would send the end may be the one that waits for this answer (K-2)."""
    await with_region(model)
    await model.begin(PAGE + 4, 3)
    began = trio.current_time()
    assert await model.prefault(GFN, PAGES) == (PAGES, PAGES - 3)
    assert trio.current_time() == began
    assert model.pfns(GFN + 3, 5) == [PFN + 3, None, None, None, PFN + 7]


async def test_an_invalidation_meanwhile_is_no_error(model: ModelPartition, nursery: trio.Nursery) -> None:
    """It makes the attempt stale, which starts again."""
    model.address_space.may_block = True
    await with_region(model)
    gate = model.gates.hold(Point.RESOLVED)
    call = Running(nursery, model.prefault, GFN, PAGES)
    await gate.wait_reached()
    await model.unmap_vma(PAGE, PAGES)
    await model.map_vma(PAGE, PAGES - 1, 2 * PFN)
    gate.open()
    assert await call.result() == (PAGES, PAGES - 1)
    assert model.pfns(GFN, 2) == [2 * PFN, 2 * PFN + 1]


async def test_it_waits_for_another_vps_map_of_the_page(model: ModelPartition, nursery: trio.Nursery) -> None:
    await with_region(model)
    gate = model.gates.hold(Point.MAP)
    other = Running(nursery, model.fault, GFN)
    await gate.wait_reached()
    call = Running(nursery, model.prefault, GFN, PAGES)
    await wait_all_tasks_blocked()
    assert not call.done
    gate.open()
    assert await call.result() == (PAGES, PAGES)
    assert await other.result() is Answer.MAPPED
    assert model.hypervisor.events == [Mapped(GFN, GFN + PAGES, PFN, Access.READ | Access.WRITE)]


async def test_it_neither_counts_among_the_repeats_of_a_vp_nor_restarts_them(model: ModelPartition) -> None:
    """V-5."""
    await with_region(model)
    answers = []
    async with attached_vp(model) as vp:
        for _ in range(REPEATS + 2):
            answers.append(await vp.peer.intercept(GFN))
            await model.prefault(GFN, PAGES)
    assert answers == [Answer.MAPPED, *[Answer.ALREADY_MAPPED] * REPEATS, Answer.NO_PROGRESS]


# ------------------------------------------------ a hypervisor that refuses


async def test_a_refused_map_of_the_first_page_is_eio(model: ModelPartition) -> None:
    await with_region(model)
    model.hypervisor.refuse_map()
    with pytest.raises(WireError) as refused:
        await model.prefault(GFN, PAGES)
    assert (refused.value.number, refused.value.details) == (errno.EIO, {"start_gfn": GFN})


async def test_a_refused_map_of_a_later_page_ends_the_call_before_it(model: ModelPartition) -> None:
    await with_region(model)
    await model.map_vma(PAGE + PAGES, 1, PFN + PAGES)
    await model.add_region(GFN + PAGES, 1, PAGE + PAGES)
    model.hypervisor.refuse_map(nth=2)
    assert await model.prefault(GFN, PAGES + 1) == (PAGES, PAGES)
    assert await model.prefault(GFN + PAGES, 1) == (1, 1), "it is asked for again"


async def test_a_range_that_ends_beyond_the_last_gfn_is_refused(model: ModelPartition) -> None:
    with pytest.raises(ValueError, match="page_count"):
        await model.prefault(PAGE_LIMIT - 1, 2)
    assert GfnRange.of(PAGE_LIMIT - 1, 1).end == PAGE_LIMIT
