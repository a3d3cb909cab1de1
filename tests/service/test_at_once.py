"""Without contention an intercept and an invalidation are one step each, without a checkpoint.

The model's hypervisor says that it may block, for the sake of the gates; here it says that it does not, like
the software one.
"""

from __future__ import annotations

from functools import partial
from time import perf_counter_ns

import pytest
import trio
from structlog.testing import capture_logs
from trio.testing import assert_no_checkpoints, wait_all_tasks_blocked

from explorer.pauses import Point
from explorer.ports import Mapped, Unmapped
from fakes.model_partition import ModelPartition
from fakes.model_vp import attached_vp
from fakes.running import Running
from intercept_protocol import messages
from intercept_protocol.addresses import PAGE_SHIFT, GfnRange, UaddrRange
from intercept_protocol.messages import MmioGranularity
from intercept_protocol.outcomes import Access, Answer
from interceptd.errors import PartitionLost
from interceptd.memory.attempt import Busy
from interceptd.memory.fault_handler import Fault
from interceptd.memory.region import LARGE_PAGE, Region
from interceptd.pages.mapping import Mapping
from interceptd.sessions.notifier import NotifierSession
from interceptd.sessions.vmm import kick

GFN, PAGE, PFN, PAGES = 0x100, 0x9000, 0x7000, 16
RANGE = {"start_uaddr": PAGE << PAGE_SHIFT, "length": PAGES << PAGE_SHIFT}


@pytest.fixture
async def prompt(model: ModelPartition) -> ModelPartition:
    """With one MMIO region that nothing is mapped of."""
    await model.map_vma(PAGE, PAGES, PFN)
    await model.add_region(GFN, PAGES, PAGE)
    model.hypervisor.may_block = False
    return model


async def at_once(model: ModelPartition, gfn: int, access: Access = Access.READ) -> Answer | None:
    """The answer to an access that the look-up did not decide, if it can be given in one step."""
    found = model.faults.lookup(gfn, access)
    assert isinstance(found, Busy | Region)
    return await model.faults.handle_nowait(Fault(gfn, access, found))


# ------------------------------------------------ an intercept


@pytest.mark.parametrize("may_block", [False, True])
async def test_the_first_touch_of_a_page_makes_one_look_up(
    prompt: ModelPartition, monkeypatch: pytest.MonkeyPatch, *, may_block: bool
) -> None:
    """Whether it is answered in one step or may have to wait for the hypervisor."""
    lookup, looked_up = prompt.regions.lookup, []

    def counted(gfn: int, access: Access) -> Mapping | Answer | Busy | Region:
        looked_up.append(gfn)
        return lookup(gfn, access)

    monkeypatch.setattr(prompt.regions, "lookup", counted)
    monkeypatch.setattr(prompt.faults, "lookup", counted)
    prompt.hypervisor.may_block = may_block
    async with attached_vp(prompt) as vp:
        assert await vp.peer.intercept(GFN) is Answer.MAPPED
    assert looked_up == [GFN]


async def test_what_a_wait_has_outdated_is_looked_up_again(
    prompt: ModelPartition, nursery: trio.Nursery
) -> None:
    """The region went while the fault waited for the end of an invalidation."""
    await prompt.begin(PAGE, 1)
    fault = Running(nursery, prompt.fault, GFN)
    await wait_all_tasks_blocked()
    await prompt.remove_region(GFN, PAGES, PAGE)
    prompt.end(PAGE, 1)
    assert await fault.result() is Answer.NO_REGION


async def test_a_first_touch_that_nobody_holds_up_is_one_step(prompt: ModelPartition) -> None:
    with assert_no_checkpoints():
        assert await at_once(prompt, GFN) is Answer.MAPPED
    assert prompt.pfn(GFN) == PFN


@pytest.mark.parametrize("may_block", [False, True])
async def test_a_first_touch_that_nothing_is_in_the_way_of_needs_no_attempt(
    prompt: ModelPartition, monkeypatch: pytest.MonkeyPatch, *, may_block: bool
) -> None:
    prompt.hypervisor.may_block = may_block
    monkeypatch.setattr(prompt.regions, "begin", None)
    assert await at_once(prompt, GFN) is Answer.MAPPED
    [region] = prompt.regions.first_regions(1)
    assert region.mapped_gfns == PAGES


@pytest.mark.parametrize("may_block", [False, True])
async def test_a_first_touch_that_there_is_no_room_for_is_refused(
    prompt: ModelPartition, monkeypatch: pytest.MonkeyPatch, *, may_block: bool
) -> None:
    prompt.hypervisor.may_block = may_block
    prompt.regions.mmio_granularity = MmioGranularity.PAGE
    monkeypatch.setattr(prompt.regions._mappings, "_limit", lambda: 1)
    monkeypatch.setattr(prompt.regions, "commit", None)
    assert await at_once(prompt, GFN) is Answer.MAPPED
    monkeypatch.undo()
    monkeypatch.setattr(prompt.regions._mappings, "_limit", lambda: 1)
    with capture_logs():
        assert await at_once(prompt, GFN + 2) is Answer.HYPERVISOR_ERROR
    assert prompt.regions.mapping_count == 1


async def test_a_page_that_is_being_invalidated_is_not_decided_at_once(prompt: ModelPartition) -> None:
    await prompt.begin(PAGE, 1)
    with assert_no_checkpoints():
        assert await at_once(prompt, GFN) is None
    assert prompt.address_space.resolved == []


async def test_a_mapped_page_that_is_being_invalidated_is_not_decided_at_once(prompt: ModelPartition) -> None:
    await prompt.fault(GFN)
    prompt.notifier.invalidate(UaddrRange.at_page(PAGE, 1))
    with assert_no_checkpoints():
        assert await at_once(prompt, GFN) is None


async def test_a_map_that_is_refused_at_once_leaves_what_was_mapped_beside_it(prompt: ModelPartition) -> None:
    prompt.regions.mmio_granularity = MmioGranularity.PAGE
    for gfn in (GFN, GFN + 2):
        assert await at_once(prompt, gfn) is Answer.MAPPED
    prompt.hypervisor.refuse_map()
    with capture_logs() as logs:
        assert await at_once(prompt, GFN + 1) is Answer.HYPERVISOR_ERROR
    assert [log["event"] for log in logs] == ["map_refused"]
    assert [mapping.gfns for mapping in prompt.regions.first_mappings(3)] == [
        GfnRange(start=gfn, end=gfn + 1) for gfn in (GFN, GFN + 2)
    ]
    assert await at_once(prompt, GFN + 1) is Answer.MAPPED


async def test_a_no_is_decided_at_once_too(prompt: ModelPartition) -> None:
    await prompt.protect_vma(PAGE, PAGES, Access.READ)
    assert await at_once(prompt, GFN, Access.WRITE) is Answer.PERMISSION
    await prompt.map_vma(PAGE + PAGES, PAGES, PFN)
    await prompt.add_region(GFN + PAGES, PAGES, PAGE + PAGES, kind=None)
    await prompt.unmap_vma(PAGE + PAGES, PAGES)
    await prompt.map_vma(PAGE + PAGES, PAGES, PFN, io=True)
    assert await at_once(prompt, GFN + PAGES) is Answer.UNBACKED


async def test_what_is_mapped_at_once_is_counted_and_timed_like_all_else(prompt: ModelPartition) -> None:
    """A page of a large one, then the same again when it is refused, then the rest of it."""
    gfn, page, began = 0x400, 0x8000, perf_counter_ns()
    await prompt.map_vma(page, LARGE_PAGE, PFN)
    await prompt.add_region(gfn, LARGE_PAGE, page)
    prompt.regions.mmio_granularity = MmioGranularity.PAGE
    assert await at_once(prompt, gfn) is Answer.MAPPED
    assert prompt.faults.split_large_pages == 1
    prompt.hypervisor.refuse_map()
    assert await at_once(prompt, gfn + 1) is Answer.HYPERVISOR_ERROR
    assert prompt.faults.split_large_pages == 1
    prompt.regions.mmio_granularity = MmioGranularity.VMA
    assert await at_once(prompt, gfn + 1) is Answer.MAPPED
    stages = prompt.faults.stages
    assert (stages.resolve.count, stages.map.count) == (3, 3)
    assert stages.resolve.total_ns + stages.map.total_ns < perf_counter_ns() - began


async def test_a_first_touch_waits_only_for_the_hypervisor_and_is_not_broken_off(
    prompt: ModelPartition, nursery: trio.Nursery
) -> None:
    prompt.hypervisor.may_block = True
    mapping = prompt.gates.hold(Point.MAP)
    touch = Running(nursery, at_once, prompt, GFN)
    await mapping.wait_reached()
    assert not await touch.cancel()
    mapping.open()
    assert await touch.result() is Answer.MAPPED


async def test_a_page_whose_first_touch_the_hypervisor_has_not_confirmed_is_not_mapped_yet(
    prompt: ModelPartition, nursery: trio.Nursery
) -> None:
    """Another VP waits for the outcome, and an invalidation takes away what the map brings."""
    prompt.hypervisor.may_block = True
    mapping = prompt.gates.hold(Point.MAP)
    touch = Running(nursery, at_once, prompt, GFN)
    await mapping.wait_reached()
    assert isinstance(prompt.faults.lookup(GFN, Access.READ), Busy)
    going = Running(nursery, prompt.invalidate, PAGE, 1)
    await wait_all_tasks_blocked()
    assert not going.done
    mapping.open()
    assert await touch.result() is Answer.MAPPED
    await going.result()
    assert prompt.pfns(GFN, 2) == [None, PFN + 1]


async def test_a_first_touch_that_the_hypervisor_refuses_is_not_recorded(
    prompt: ModelPartition,
) -> None:
    prompt.hypervisor.may_block = True
    prompt.hypervisor.refuse_map()
    with capture_logs():
        assert await at_once(prompt, GFN) is Answer.HYPERVISOR_ERROR
    assert prompt.regions.mapping_count == 0
    assert not prompt.regions.busy


async def test_a_first_touch_while_something_else_is_invalidated_is_an_attempt(
    prompt: ModelPartition,
) -> None:
    """The straight line is for when nothing is."""
    prompt.hypervisor.may_block = True
    await prompt.map_vma(PAGE + PAGES, 1, PFN)
    await prompt.begin(PAGE + PAGES, 1)
    assert not prompt.regions.quiet
    assert await at_once(prompt, GFN) is Answer.MAPPED


async def test_known_memory_waits_for_nothing_but_the_hypervisor(prompt: ModelPartition) -> None:
    prompt.address_space.may_block = prompt.hypervisor.may_block = True
    prompt.regions.mmio_granularity = MmioGranularity.PAGE
    assert await at_once(prompt, GFN) is None
    assert await prompt.fault(GFN) is Answer.MAPPED
    assert await at_once(prompt, GFN + 1) is Answer.MAPPED


async def test_a_fault_that_may_wait_for_the_address_space_is_not_decided_at_once(
    prompt: ModelPartition,
) -> None:
    prompt.address_space.may_block = True
    assert await at_once(prompt, GFN) is None
    assert prompt.address_space.resolved == []


async def test_a_fault_that_would_wait_for_the_lock_is_not_decided_at_once(
    prompt: ModelPartition, nursery: trio.Nursery
) -> None:
    await prompt.map_vma(PAGE + PAGES, 1, PFN)
    await prompt.add_region(GFN + PAGES, 1, PAGE + PAGES)
    prompt.hypervisor.may_block = True
    mapping = prompt.gates.hold(Point.MAP)
    fault = Running(nursery, prompt.fault, GFN)
    await mapping.wait_reached()
    prompt.hypervisor.may_block = False
    assert await at_once(prompt, GFN + PAGES) is None
    mapping.open()
    assert await fault.result() is Answer.MAPPED


async def test_i4_a_fault_decided_at_once_ends_at_its_deadline_too(
    prompt: ModelPartition, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each map takes time without waiting: the faulting page is not among the first."""
    pages = 64
    await prompt.map_vma(PAGE + 0x100, pages, PFN)
    await prompt.add_region(GFN + 0x100, pages, PAGE + 0x100)
    prompt.regions.mmio_granularity = messages.MmioGranularity.PAGE
    for page in range(0, pages, 2):
        await prompt.fault(GFN + 0x100 + page)
    prompt.regions.mmio_granularity = messages.MmioGranularity.VMA
    began = now = trio.current_time()
    before = len(prompt.hypervisor.events)

    def passing() -> float:
        nonlocal now
        now += 1
        return now

    monkeypatch.setattr(trio, "current_time", passing)
    found = prompt.faults.lookup(GFN + 0x100 + pages - 1, Access.READ)
    assert isinstance(found, Region)
    fault = Fault(GFN + 0x100 + pages - 1, Access.READ, found)
    assert await prompt.faults.handle_nowait(fault) is None
    assert now - began < pages // 2
    assert len(prompt.hypervisor.events) > before + 1
    await prompt.remove_region(GFN + 0x100, pages, PAGE + 0x100)
    assert await prompt.faults.handle(fault, lambda _: None) is Answer.NO_REGION, "it is looked up again"


async def test_a_vp_learns_of_a_partition_lost_at_once(
    prompt: ModelPartition, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def breaks_down(_: object) -> None:
        raise RuntimeError("out of order")

    monkeypatch.setattr(prompt.software, "map_gpas", breaks_down)
    lost: list[PartitionLost] = []
    with capture_logs():
        try:
            async with attached_vp(prompt) as vp:
                assert await vp.peer.intercept(GFN) is Answer.HYPERVISOR_ERROR
                await vp.ended.wait()
        except* PartitionLost as group:
            lost += [each for each in group.exceptions if isinstance(each, PartitionLost)]
    assert len(lost) == 1


# ------------------------------------------------ an invalidation


@pytest.mark.parametrize("call", [messages.Invalidate(**RANGE), messages.InvalidateBegin(**RANGE)])
async def test_an_uncontended_announcement_is_served_by_its_caller(
    prompt: ModelPartition, call: messages.NotifierCall
) -> None:
    await prompt.fault(GFN)
    answering = NotifierSession(prompt.notifier, prompt.regions, partial(kick, prompt.partition)).answer(call)
    assert answering is not None
    with assert_no_checkpoints():
        await answering
    assert prompt.pfn(GFN) is None


@pytest.mark.parametrize("call", [messages.Invalidate(**RANGE), messages.InvalidateBegin(**RANGE)])
async def test_what_its_caller_serves_does_not_wake_the_region_managers_task(
    prompt: ModelPartition, call: messages.NotifierCall
) -> None:
    answering = NotifierSession(prompt.notifier, prompt.regions, partial(kick, prompt.partition)).answer(call)
    assert answering is not None
    await wait_all_tasks_blocked()
    await answering
    assert prompt.notifier._doorbell.statistics().tasks_waiting_receive == 1


@pytest.mark.parametrize("call", [messages.Invalidate(**RANGE), messages.InvalidateBegin(**RANGE)])
async def test_an_announcement_during_the_pass_of_another_is_served_after_it(
    prompt: ModelPartition, nursery: trio.Nursery, call: messages.NotifierCall
) -> None:
    await prompt.map_vma(PAGE + PAGES, 1, PFN)
    await prompt.add_region(GFN + PAGES, 1, PAGE + PAGES)
    await prompt.fault(GFN)
    await prompt.fault(GFN + PAGES)
    unmapping = prompt.gates.hold(Point.UNMAP)
    first = Running(nursery, prompt.invalidate, PAGE + PAGES, 1)
    await unmapping.wait_reached()
    session = NotifierSession(prompt.notifier, prompt.regions, partial(kick, prompt.partition))
    answering = session.answer(call)
    assert answering is not None
    second = Running(nursery, lambda: answering)
    await wait_all_tasks_blocked()
    unmapping.open()
    await first.result()
    await wait_all_tasks_blocked()
    assert second.done
    assert prompt.pfn(GFN) is None


async def test_an_uncontended_unmap_vma_is_one_step(prompt: ModelPartition) -> None:
    await prompt.fault(GFN)
    with assert_no_checkpoints():
        await prompt.unmap_vma(PAGE, PAGES)
    assert (prompt.pfn(GFN), prompt.notifier.open_invalidations) == (None, 0)


async def test_pending_announcements_of_others_are_served_with_it(prompt: ModelPartition) -> None:
    await prompt.fault(GFN)
    read = prompt.notifier.invalidate(UaddrRange.at_page(PAGE, 4))
    await prompt.regions.wait_served(prompt.notifier.invalidate(UaddrRange.at_page(PAGE + 8, 4)))
    assert read.done.is_set()
    assert prompt.pfns(GFN, PAGES) == [None] * 4 + [*range(PFN + 4, PFN + 8)] + [None] * 4 + [
        *range(PFN + 12, PFN + 16)
    ]


async def test_the_region_managers_task_has_nothing_to_do_after_the_source_has_served(
    prompt: ModelPartition,
) -> None:
    await prompt.fault(GFN)
    await prompt.regions.wait_served(prompt.notifier.invalidate(UaddrRange.at_page(PAGE, PAGES)))
    passes = prompt.notifier.take()
    await wait_all_tasks_blocked()
    assert prompt.notifier._serving is passes, "it would have served another"
    assert prompt.hypervisor.events == [
        Mapped(GFN, GFN + PAGES, PFN, Access.READ | Access.WRITE),
        Unmapped(GFN, GFN + PAGES),
    ]


async def test_the_region_managers_task_serves_later_batches_after_a_spurious_ring(
    prompt: ModelPartition,
) -> None:
    await prompt.fault(GFN)
    await prompt.regions.wait_served(prompt.notifier.invalidate(UaddrRange.at_page(PAGE, 1)))
    await wait_all_tasks_blocked()
    await prompt.notifier.invalidate(UaddrRange.at_page(PAGE + 1, 1)).done.wait()
    assert prompt.pfns(GFN, 3) == [None, None, PFN + 2]


async def test_announcements_during_a_pass_are_served_by_its_next_round(
    model: ModelPartition,
) -> None:
    for _ in range(20):  # trio randomises the order within a round
        await wait_all_tasks_blocked()
        first = model.notifier.invalidate(UaddrRange.at_page(PAGE, 1))
        await trio.lowlevel.checkpoint()
        assert model.notifier.invalidate(UaddrRange.at_page(PAGE + 8, 1)) is first
        await first.done.wait()


async def test_a_caller_whose_pass_waits_for_the_hypervisor_cannot_be_cancelled(
    model: ModelPartition, nursery: trio.Nursery
) -> None:
    """Only the hypervisor's deadline ends that wait: nothing may see a pass that is half made."""
    await model.map_vma(PAGE, PAGES, PFN)
    await model.add_region(GFN, PAGES, PAGE)
    await model.fault(GFN)
    unmapping = model.gates.hold(Point.UNMAP)
    batch = model.notifier.invalidate(UaddrRange.at_page(PAGE, PAGES))
    waiting = Running(nursery, model.regions.wait_served, batch)
    await unmapping.wait_reached()
    assert not await waiting.cancel()
    unmapping.open()
    await waiting.result()
    assert model.pfn(GFN) is None


async def test_a_caller_who_waits_for_the_pass_of_another_can_be_cancelled(
    model: ModelPartition, nursery: trio.Nursery
) -> None:
    await model.map_vma(PAGE, PAGES, PFN)
    await model.add_region(GFN, PAGES, PAGE)
    await model.fault(GFN)
    unmapping = model.gates.hold(Point.UNMAP)
    first = model.notifier.invalidate(UaddrRange.at_page(PAGE, 1))
    passing = Running(nursery, model.regions.wait_served, first)
    await unmapping.wait_reached()
    second = model.notifier.invalidate(UaddrRange.at_page(PAGE + 1, 1))
    waiting = Running(nursery, model.regions.wait_served, second)
    await wait_all_tasks_blocked()
    assert await waiting.cancel()
    unmapping.open()
    await passing.result()
    await second.done.wait()
    assert model.pfns(GFN, 2) == [None, None]


async def test_an_announcement_is_served_though_its_caller_has_left(
    model: ModelPartition, nursery: trio.Nursery
) -> None:
    """It rang for nobody before, because it was to be served by its caller."""
    await model.map_vma(PAGE, PAGES, PFN)
    await model.add_region(GFN, PAGES, PAGE)
    mapping = model.gates.hold(Point.MAP)
    fault = Running(nursery, model.fault, GFN)
    await mapping.wait_reached()
    batch = model.notifier.invalidate(UaddrRange.at_page(PAGE, 1), ring=False)
    waiting = Running(nursery, model.regions.wait_served, batch)
    await wait_all_tasks_blocked()
    assert await waiting.cancel()
    mapping.open()
    await fault.result()
    await wait_all_tasks_blocked()
    assert batch.done.is_set()
    assert model.pfn(GFN) is None


async def test_an_announcement_while_the_lock_is_held_waits_for_the_region_managers_task(
    prompt: ModelPartition, nursery: trio.Nursery
) -> None:
    prompt.hypervisor.may_block = True
    mapping = prompt.gates.hold(Point.MAP)
    fault = Running(nursery, prompt.fault, GFN)
    await mapping.wait_reached()
    prompt.hypervisor.may_block = False
    batch = prompt.notifier.invalidate(UaddrRange.at_page(PAGE, PAGES))
    served = Running(nursery, prompt.regions.wait_served, batch)
    await wait_all_tasks_blocked()
    assert not served.done
    mapping.open()
    await served.result()
    await fault.result()
    assert prompt.pfn(GFN) is None
