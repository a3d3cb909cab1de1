"""What is remembered of VMAs: which questions first touches still ask, and when what was learned is used.

The model's address space says that it may block, like that of live memory; `resolved` are its questions.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial

import pytest
import trio
from trio.testing import assert_no_checkpoints, wait_all_tasks_blocked

from explorer.kept_log import KeptLog
from explorer.model_partition import Parts, addition, removal
from explorer.pauses import Point
from explorer.successor import Successor
from fakes.model_partition import ModelPartition
from fakes.running import Running
from intercept_protocol.addresses import UaddrRange
from intercept_protocol.messages import MmioGranularity
from intercept_protocol.outcomes import Access, Answer
from interceptd.address_space.declared import Vma
from interceptd.memory.fault_handler import Fault
from interceptd.memory.known_vmas import KNOWN_EXTENTS, KnownVmas
from interceptd.memory.region import Region
from interceptd.memory_budget import CACHES, CacheShare, MemoryBudget, MemoryShare
from interceptd.pages.mapping import Extent, Frame

GFN, PAGE, PFN, PAGES = 0x100, 0x9000, 0x7000, 16
RW = Access.READ | Access.WRITE


@pytest.fixture
async def live(model: ModelPartition) -> ModelPartition:
    return await over_one_vma(model)


async def over_one_vma(model: ModelPartition) -> ModelPartition:
    """With one region over one VMA, whose faults map a page each."""
    await model.map_vma(PAGE, PAGES, PFN)
    await model.add_region(GFN, PAGES, PAGE)
    model.regions.mmio_granularity = MmioGranularity.PAGE
    model.address_space.may_block = True
    model.hypervisor.may_block = False
    return model


async def at_once(model: ModelPartition, gfn: int, access: Access = Access.READ) -> Answer | None:
    found = model.faults.lookup(gfn, access)
    assert isinstance(found, Region)
    with assert_no_checkpoints():
        return await model.faults.handle_nowait(Fault(gfn, access, found))


# ------------------------------------------------ what is asked


@pytest.mark.parametrize("may_block", [False, True])
async def test_of_each_vma_only_the_first_touch_asks(live: ModelPartition, *, may_block: bool) -> None:
    live.hypervisor.may_block = may_block
    for gfn in range(GFN, GFN + PAGES):
        assert await live.fault(gfn) is Answer.MAPPED
    assert live.pfns(GFN, PAGES) == list(range(PFN, PFN + PAGES))
    assert live.address_space.resolved == [PAGE]


async def test_what_is_known_is_mapped_in_one_step(live: ModelPartition) -> None:
    assert await at_once(live, GFN) is None
    await live.fault(GFN)
    assert await at_once(live, GFN + 1) is Answer.MAPPED
    assert live.faults.stages.resolve.count == live.faults.stages.map.count == 2


async def test_an_inferred_kind_is_asked_for_once_too(live: ModelPartition) -> None:
    await live.map_vma(PAGE + PAGES, PAGES, PFN + 0x100, io=True)
    live.address_space.may_block = False
    await live.add_region(GFN + PAGES, PAGES, PAGE + PAGES, kind=None)
    live.address_space.may_block = True
    await live.fault(GFN + PAGES)
    assert await at_once(live, GFN + PAGES + 1) is Answer.MAPPED


async def test_of_memory_that_never_blocks_nothing_is_remembered(live: ModelPartition) -> None:
    live.address_space.may_block = False
    await live.fault(GFN)
    assert len(live.known) == 0


async def test_nothing_is_remembered_without_a_vma(live: ModelPartition) -> None:
    """Like memory that is neither announced nor watched."""
    await live.unmap_vma(PAGE, PAGES)
    assert await live.fault(GFN) is Answer.UNBACKED
    assert len(live.known) == 0


# ------------------------------------------------ only a "yes" comes from memory


async def test_a_page_without_a_vma_is_asked_for_each_time(live: ModelPartition) -> None:
    await live.unmap_vma(PAGE, PAGES)
    assert await live.fault(GFN) is Answer.UNBACKED
    await live.map_vma(PAGE, PAGES, PFN)  # announces nothing: nothing was there
    assert await live.fault(GFN) is Answer.MAPPED


@pytest.mark.parametrize("may_block", [False, True])
async def test_a_right_that_was_not_there_is_asked_for_again(
    live: ModelPartition, *, may_block: bool
) -> None:
    """A VMM need not announce that it gives a VMA more rights."""
    live.hypervisor.may_block = may_block
    await live.protect_vma(PAGE, PAGES, Access.READ)
    await live.fault(GFN)
    assert await live.fault(GFN + 1, Access.WRITE) is Answer.PERMISSION
    live.declared._vmas.carve(UaddrRange.at_page(PAGE, PAGES))
    live.declared.map_vma(Vma(PAGE, PAGE + PAGES, PFN, RW, io=False))
    assert await live.fault(GFN + 1, Access.WRITE) is Answer.MAPPED


# ------------------------------------------------ learning is an attempt over all that is learned


@pytest.mark.parametrize("point", [Point.RESOLVE, Point.RESOLVED])
async def test_nothing_is_learned_if_any_of_it_was_invalidated_meanwhile(
    live: ModelPartition, nursery: trio.Nursery, point: Point
) -> None:
    resolving = live.gates.hold(point)
    fault = Running(nursery, live.fault, GFN)
    await resolving.wait_reached()
    await live.invalidate(PAGE + PAGES - 1, 1)
    resolving.open()
    assert await fault.result() is Answer.MAPPED
    assert len(live.known) == 0
    assert live.notifier.stale_windows == 0  # the attempt was about another page


async def test_nothing_is_learned_in_an_open_range(live: ModelPartition) -> None:
    await live.begin(PAGE + 4, 4)
    await live.fault(GFN)
    assert live.known.find(PAGE + 3, UaddrRange.at_page(PAGE + 3, 1)) is not None
    assert live.known.find(PAGE + 4, UaddrRange.at_page(PAGE + 4, 1)) is None
    live.end(PAGE + 4, 4)


async def test_an_invalidation_forgets_what_it_overlaps_in_its_own_step(live: ModelPartition) -> None:
    await live.fault(GFN)
    live.notifier.invalidate(UaddrRange.at_page(PAGE + 4, 4))
    known = [page for page in range(PAGE, PAGE + PAGES) if live.known.find(page, UaddrRange.at_page(page, 1))]
    assert known == [*range(PAGE, PAGE + 4), *range(PAGE + 8, PAGE + PAGES)]


async def remove_and_add(live: ModelPartition, meanwhile: Callable[[], None]) -> None:
    await live.remove_region(GFN, PAGES, PAGE)
    meanwhile()
    await live.add_region(GFN, PAGES, PAGE)


async def shorten_and_lengthen(live: ModelPartition, meanwhile: Callable[[], None]) -> None:
    whole, some = (GFN, PAGES, PAGE), (GFN, PAGES - 8, PAGE)
    await live.change_regions([removal(*whole)], [addition(*some)])
    meanwhile()
    await live.change_regions([removal(*some)], [addition(*whole)])


@pytest.mark.parametrize("without", [remove_and_add, shorten_and_lengthen])
async def test_nothing_is_known_of_memory_in_no_region(
    live: ModelPartition, without: Callable[[ModelPartition, Callable[[], None]], Awaitable[None]]
) -> None:
    """Nobody may tell of its changes."""
    await live.fault(GFN)
    await without(live, partial(live.map_fixed, PAGE + PAGES - 8, 8, PFN + 0x100))
    assert await live.fault(GFN + PAGES - 8) is Answer.MAPPED
    assert live.pfn(GFN + PAGES - 8) == PFN + 0x100


async def test_what_was_reported_is_announced_before_what_is_known_is_used(
    live: ModelPartition, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The munmap behind an event that is not read yet has not returned, but its memory may be another's."""
    await live.fault(GFN)
    live.declared._vmas.carve(UaddrRange.at_page(PAGE, PAGES))
    live.declared.map_vma(Vma(PAGE, PAGE + PAGES, PFN + 0x100, RW, io=False))
    reported = [UaddrRange.at_page(PAGE, PAGES)]

    def drain_nowait() -> bool:
        if not reported:
            return True
        live.notifier.invalidate(reported.pop())
        return False

    monkeypatch.setattr(live.address_space, "drain_nowait", drain_nowait)
    assert await live.fault(GFN + 1) is Answer.MAPPED
    assert live.pfn(GFN + 1) == PFN + 0x101


async def test_what_is_reported_while_a_fault_begins_does_not_let_it_wait_uninterruptibly(
    live: ModelPartition, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the hypervisor may block, only its call may: a VMM can make a question block for ever."""
    await live.fault(GFN)
    live.hypervisor.may_block = True
    drains = iter([True])
    monkeypatch.setattr(live.address_space, "drain_nowait", partial(next, drains, False))
    assert await at_once(live, GFN + 1) is Answer.MAPPED
    assert live.address_space.resolved == [PAGE]
    assert await at_once(live, GFN + 2) is None
    with assert_no_checkpoints():
        await live.notifier.outlive_what_was_learned()  # no attempt was left open


async def test_a_comparison_begins_with_nothing_known(live: ModelPartition, nursery: trio.Nursery) -> None:
    """Not even what was looked up before it began, and is learned only now."""
    resolving = live.gates.hold(Point.RESOLVED)
    fault = Running(nursery, live.fault, GFN)
    await resolving.wait_reached()
    outlived = Running(nursery, live.notifier.outlive_what_was_learned)
    await wait_all_tasks_blocked()
    resolving.open()
    await fault.result()
    await outlived.result()
    assert len(live.known) == 0


async def test_what_was_learned_before_a_comparison_is_not_used_while_it_waits(
    live: ModelPartition, nursery: trio.Nursery
) -> None:
    """A fault that begins meanwhile is not waited for, and may map when the comparison has seen all."""
    await live.fault(GFN)
    await live.add_region(GFN + PAGES, PAGES, PAGE + PAGES)
    resolving = live.gates.hold(Point.RESOLVED)
    before = Running(nursery, live.fault, GFN + PAGES)
    await resolving.wait_reached()
    live.map_fixed(PAGE, PAGES, PFN + 0x100)  # unannounced, like shmat(SHM_REMAP)
    outlived = Running(nursery, live.notifier.outlive_what_was_learned)
    await wait_all_tasks_blocked()
    async with live.mappings.lock:
        meanwhile = Running(nursery, live.fault, GFN + 1)
        await wait_all_tasks_blocked()
        assert not outlived.done
        resolving.open()
        await outlived.result()
        assert not meanwhile.done
    assert await before.result() is Answer.UNBACKED
    assert await meanwhile.result() is Answer.MAPPED
    assert live.pfn(GFN + 1) == PFN + 0x101


async def test_a_look_that_is_cut_short_teaches_nothing_and_is_not_waited_for(
    live: ModelPartition, nursery: trio.Nursery
) -> None:
    resolving = live.gates.hold(Point.RESOLVED)
    fault = Running(nursery, live.fault, GFN)
    await resolving.wait_reached()
    assert await fault.cancel()
    with assert_no_checkpoints():
        await live.notifier.outlive_what_was_learned()
    assert len(live.known) == 0


async def test_a_successor_of_the_daemon_asks_again() -> None:
    log = KeptLog()
    async with ModelPartition(log=log).running() as running:
        live = await over_one_vma(running)
        await live.fault(GFN)
        successor = Successor(Parts(), log.frames, [], [], pieces_per_call=1).model
    successor.address_space.may_block = True
    assert await successor.fault(GFN + PAGES - 1) is Answer.MAPPED
    assert successor.address_space.resolved == [PAGE + PAGES - 1]


# ------------------------------------------------ which part of a VMA is known


def extent(start: int, end: int, *, vma: UaddrRange | None = None) -> Extent:
    uaddrs = UaddrRange(start=start, end=end)
    return Extent(uaddrs, Frame("file", start + 1000), RW, False, vma or uaddrs)


def test_an_extent_is_cut_to_the_window() -> None:
    known = KnownVmas()
    known.learn(extent(10, 30))
    assert known.find(12, UaddrRange(start=5, end=20)) == extent(10, 20, vma=UaddrRange(start=10, end=30))
    assert known.find(25, UaddrRange(start=20, end=40)) == extent(20, 30, vma=UaddrRange(start=10, end=30))
    assert known.find(9, UaddrRange(start=5, end=20)) is None
    assert known.find(30, UaddrRange(start=5, end=40)) is None


@pytest.mark.parametrize("forgotten", [UaddrRange(start=10, end=12), UaddrRange(start=28, end=30)])
def test_a_window_of_which_the_vma_backs_more_than_is_known_is_asked_for(forgotten: UaddrRange) -> None:
    known = KnownVmas()
    known.learn(extent(10, 30))
    known.forget(forgotten)
    assert known.find(20, UaddrRange(start=0, end=40)) is None
    assert known.find(20, UaddrRange(start=12, end=28)) is not None


def test_what_is_learned_takes_the_place_of_what_was_known() -> None:
    known = KnownVmas()
    known.learn(extent(10, 30))
    known.learn(extent(20, 40))
    assert len(known) == 2
    assert known.find(20, UaddrRange(start=20, end=40)) == extent(20, 40)


def test_no_more_than_a_limit_is_remembered_and_the_first_stay() -> None:
    known = KnownVmas()
    for start in range(0, 3 * KNOWN_EXTENTS + 30, 3):
        known.learn(extent(start, start + 2))
    assert len(known) == KNOWN_EXTENTS
    find = partial(known.find, window=UaddrRange(start=0, end=10_000))
    assert find(0) is not None
    assert find(3 * KNOWN_EXTENTS) is None
    known.forget(UaddrRange(start=20_000, end=20_001))
    assert len(known) == KNOWN_EXTENTS


def test_learning_in_the_middle_of_what_is_known_does_not_exceed_the_limit() -> None:
    """Of a part that is asked for again and again, because it grants too little."""
    known = KnownVmas()
    known.learn(extent(0, 4 * KNOWN_EXTENTS))
    for page in range(1, 3 * KNOWN_EXTENTS, 2):
        known.learn(extent(page, page + 1))
        assert len(known) <= KNOWN_EXTENTS
    assert known.find(page, UaddrRange(start=page, end=page + 1)) == extent(page, page + 1)


def test_cutting_what_is_known_does_not_exceed_the_limit() -> None:
    known = KnownVmas()
    known.learn(extent(0, 4 * KNOWN_EXTENTS))
    for page in range(1, 3 * KNOWN_EXTENTS, 2):
        known.forget(UaddrRange(start=page, end=page + 1))
        assert len(known) <= KNOWN_EXTENTS


def test_no_more_is_remembered_than_the_uids_memory_has_room_for() -> None:
    """Two bytes of eighteen; whatever is forgotten makes room."""
    memory = MemoryShare(1, MemoryBudget(lambda: 2 * (CACHES + 1)))
    known, other = KnownVmas(CacheShare(memory, cost=1)), KnownVmas(CacheShare(memory, cost=1))
    for start in (10, 20, 30):
        known.learn(extent(start, start + 5))
    other.learn(extent(10, 15))
    assert (len(known), len(other), memory.cached) == (2, 0, 2)
    known.forget(UaddrRange(start=10, end=15))
    other.learn(extent(10, 15))
    assert (len(known), len(other), memory.cached) == (1, 1, 2)
    known.forget(UaddrRange(start=22, end=23))
    assert (len(known), len(other), memory.cached) == (0, 1, 1)


async def test_an_ended_partition_remembers_nothing(live: ModelPartition) -> None:
    await live.fault(GFN)
    assert len(live.known) == 1
    live.faults.close()
    assert len(live.known) == 0
