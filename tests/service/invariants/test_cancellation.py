"""I10: cancelling a task at any await leaves nothing untracked, and the next request is served.

Every port call awaits before and behind its work. How many awaits an operation has is counted in a run that
is not cut off, so that none is forgotten when it changes.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Final

import pytest
import trio
from structlog.testing import capture_logs
from trio.testing import MockClock

from explorer.inspection import misrecorded
from explorer.model_partition import addition, removal
from fakes.cancelling import cut_off
from fakes.model_partition import RW, ModelPartition
from fakes.one_region import GFN, PAGE, PAGES, PFN, with_region
from fakes.pauses import DrawnPauses
from intercept_protocol.addresses import PAGE_SHIFT, UaddrRange
from intercept_protocol.errors import WireError
from intercept_protocol.messages import Invalidate, InvalidateBegin, RegionKind
from intercept_protocol.outcomes import Access, Answer
from interceptd.sessions.notifier import NotifierSession
from interceptd.sessions.vmm import kick

LOOKED_AT = range(GFN - 1, GFN + PAGES + 1)
ANOTHER_PFN = 0xB000
Act = Callable[[ModelPartition], Awaitable[object]]


@dataclass(frozen=True, slots=True)
class Operation:
    """What is cut off, `call`, on a partition that `prepare` made. Both run beside the region manager."""

    prepare: Act
    call: Act


async def with_memory_mapped(model: ModelPartition, kind: RegionKind = RegionKind.MMIO) -> None:
    await with_region(model, kind)
    await model.fault(GFN)


async def with_vma(model: ModelPartition) -> None:
    await model.map_vma(PAGE, PAGES, PFN)


async def with_lists_and_vmas(model: ModelPartition, gap: int = 0) -> None:
    """Four VMAs, for a hypervisor that takes three pieces at once."""
    model.hypervisor.pieces_per_call = 3
    for page in range(0, PAGES, 4):
        await model.map_vma(PAGE + page, 4 - gap, PFN + 2 * page)


async def with_lists_and_memory_mapped(model: ModelPartition) -> None:
    await with_lists_and_vmas(model, gap=1)
    await model.add_region(GFN, PAGES, PAGE)
    for page in range(0, PAGES, 4):
        await model.fault(GFN + page)


async def with_memory_half_of_it_mapped(model: ModelPartition) -> None:
    await model.map_vma(PAGE, 3, PFN)
    await with_memory_beyond(model)


async def with_memory_beyond(model: ModelPartition) -> None:
    await model.add_region(GFN, PAGES, PAGE)
    await model.fault(GFN)
    await model.map_vma(PAGE + 3, PAGES - 3, PFN + 3)


@contextmanager
def refusing(model: ModelPartition) -> Iterator[None]:
    """The next map fails, if it comes within."""
    model.hypervisor.refuse_map()
    try:
        yield
    finally:
        model.hypervisor.refuse_map(nth=0)


async def fault(model: ModelPartition) -> None:
    assert await model.fault(GFN) in {Answer.MAPPED, Answer.ALREADY_MAPPED}


async def refused_fault(model: ModelPartition) -> None:
    with refusing(model):
        assert await model.fault(GFN) is Answer.HYPERVISOR_ERROR


async def fault_behind_an_invalidation(model: ModelPartition) -> None:
    """It waits for an invalidation that another task ends."""
    session = NotifierSession(model.notifier, model.regions, partial(kick, model.partition))
    announced = session.answer(InvalidateBegin(start_uaddr=PAGE << PAGE_SHIFT, length=1 << PAGE_SHIFT))
    assert announced is not None

    async def end() -> None:
        try:
            await announced
        finally:
            await session.close()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(end)
        await fault(model)


async def announced(model: ModelPartition) -> None:
    """A notifier connection's begin, and the end that comes with the connection's."""
    session = NotifierSession(model.notifier, model.regions, partial(kick, model.partition))
    try:
        begun = session.answer(InvalidateBegin(start_uaddr=PAGE << PAGE_SHIFT, length=PAGES << PAGE_SHIFT))
        assert begun is not None
        await begun
        assert model.pfns(GFN, PAGES) == [None] * PAGES
    finally:
        await session.close()


async def invalidated(model: ModelPartition) -> None:
    done = NotifierSession(model.notifier, model.regions, partial(kick, model.partition)).answer(
        Invalidate(start_uaddr=PAGE << PAGE_SHIFT, length=PAGES << PAGE_SHIFT)
    )
    assert done is not None
    await done


async def refused_pinned_add(model: ModelPartition) -> None:
    with refusing(model), pytest.raises(WireError):
        await model.add_region(GFN, PAGES, PAGE, RegionKind.PINNED)


async def changed(model: ModelPartition) -> None:
    """What stays, what goes, and what comes, in one region each."""
    kind = model.regions.first_regions(1)[0].kind
    await model.change_regions(
        [removal(GFN, PAGES, PAGE)],
        [addition(GFN, 4, PAGE, kind), addition(GFN + 4, PAGES - 8, PAGE + 4, kind, Access.READ)],
    )


async def refused_change(model: ModelPartition) -> None:
    with refusing(model), pytest.raises(WireError):
        await changed(model)


def of_kind(
    name: str, prepare: Callable[..., Awaitable[object]], call: Act
) -> Iterator[tuple[str, Operation]]:
    for kind in RegionKind:
        yield f"{name}, {kind}", Operation(partial(prepare, kind=kind), call)


def adding(kind: RegionKind) -> Operation:
    return Operation(with_vma, lambda model: model.add_region(GFN, PAGES, PAGE, kind))


OPERATIONS: Final[dict[str, Operation]] = {
    "a fault on MMIO": Operation(with_region, fault),
    "a fault on movable memory": Operation(partial(with_region, kind=RegionKind.MOVABLE), fault),
    "a fault with a gap to map": Operation(
        with_memory_half_of_it_mapped, lambda model: model.fault(GFN + PAGES - 1)
    ),
    "a fault whose map is refused": Operation(with_region, refused_fault),
    "a fault behind an invalidation": Operation(with_memory_mapped, fault_behind_an_invalidation),
    "a prefault": Operation(with_memory_half_of_it_mapped, lambda model: model.prefault(GFN - 1, PAGES + 2)),
    "an unmap_vma": Operation(with_memory_mapped, lambda model: model.unmap_vma(PAGE, PAGES)),
    "a protect_vma": Operation(with_memory_mapped, lambda model: model.protect_vma(PAGE, PAGES, Access.READ)),
    **dict(of_kind("a begin and its end", with_memory_mapped, announced)),
    **dict(of_kind("an invalidate", with_memory_mapped, invalidated)),
    **{f"an add, {kind}": adding(kind) for kind in RegionKind},
    "an unmap_vma of lists": Operation(
        with_lists_and_memory_mapped, lambda model: model.unmap_vma(PAGE, PAGES)
    ),
    "a remove of lists": Operation(
        with_lists_and_memory_mapped, lambda model: model.remove_region(GFN, PAGES, PAGE)
    ),
    "an add of lists": Operation(
        with_lists_and_vmas, lambda model: model.add_region(GFN, PAGES, PAGE, RegionKind.PINNED)
    ),
    "an add of lists that is refused": Operation(with_lists_and_vmas, refused_pinned_add),
    "an add that is refused": Operation(with_vma, refused_pinned_add),
    **dict(of_kind("a remove", with_memory_mapped, lambda model: model.remove_region(GFN, PAGES, PAGE))),
    **dict(of_kind("a change", with_memory_mapped, changed)),
    "a change that is refused": Operation(
        partial(with_memory_mapped, kind=RegionKind.MOVABLE), refused_change
    ),
}


def paused() -> ModelPartition:
    return ModelPartition(pauses=DrawnPauses([1]))


def every_await() -> list[tuple[str, int]]:
    """The operations, each with every await at which it can be cut off; found by running it."""

    async def count(operation: Operation) -> int:
        async with paused().running() as model:
            await operation.prepare(model)
            return await cut_off(partial(operation.call, model))

    with capture_logs():
        counts = {
            name: trio.run(count, operation, clock=MockClock(autojump_threshold=0))
            for name, operation in OPERATIONS.items()
        }
    return [(name, last) for name, steps in counts.items() for last in range(1, steps + 1)]


AWAITS: Final = every_await()


def is_settled(model: ModelPartition) -> bool:
    """Nothing is relied on, announced, locked or going any more."""
    return (
        len(model.notifier._windows) == 0
        and model.notifier.open_invalidations == 0
        and not model.regions.busy
        and not model.notifier._unserved
    )


async def serves_the_next(model: ModelPartition) -> bool:
    """Whether the partition handles the next request correctly after the cancelled one."""
    await model.unmap_vma(PAGE, PAGES)
    taken_away = model.pfns(GFN, PAGES) == [None] * PAGES
    await model.regions.close()
    empty = model.hypervisor.counters().slat_extents == 0
    await model.map_vma(PAGE, PAGES, ANOTHER_PFN, RW)
    await model.add_region(GFN, PAGES, PAGE)
    mapped = await model.fault(GFN) is Answer.MAPPED
    return taken_away and empty and mapped and model.pfn(GFN + 1) == ANOTHER_PFN + 1


@pytest.mark.parametrize(("name", "last"), AWAITS)
async def test_i10_cancellation_at_any_await_leaves_a_consistent_state(name: str, last: int) -> None:
    operation = OPERATIONS[name]
    async with paused().running() as model:
        await operation.prepare(model)
        with capture_logs():
            await cut_off(partial(operation.call, model), last)
        await trio.testing.wait_all_tasks_blocked()
        assert (misrecorded(model, LOOKED_AT), is_settled(model)) == (None, True)
        assert await serves_the_next(model)


@pytest.mark.parametrize("kind", RegionKind)
@pytest.mark.parametrize("last", range(1, 12))
async def test_i10_a_manager_cancelled_at_any_await_acknowledges_only_what_it_did(
    kind: RegionKind, last: int
) -> None:
    model = paused()
    await with_memory_mapped(model, kind)
    batch = model.notifier.invalidate(UaddrRange(start=PAGE, end=PAGE + PAGES))
    with capture_logs():
        await cut_off(bounded(model.regions.run), last)
    reached = {False: [*range(PFN, PFN + PAGES)], True: [None] * PAGES}
    assert model.pfns(GFN, PAGES) == reached[batch.done.is_set()]
    assert misrecorded(model, LOOKED_AT) is None


def bounded(forever: Callable[[], Awaitable[object]]) -> Callable[[], Awaitable[None]]:
    async def run() -> None:
        with trio.move_on_after(1):
            await forever()

    return run


async def ended(model: ModelPartition) -> None:
    """A partition's life, whose end begins at once, with an unserved invalidation."""
    model.notifier.invalidate(UaddrRange(start=PAGE, end=PAGE + PAGES))
    model.partition.end()
    await model.partition.run(trio.sleep_forever)


async def awaits_of_an_end() -> int:
    model = paused()
    await with_memory_mapped(model)
    return await cut_off(partial(ended, model))


ENDS: Final = 8
"""Awaits of an end, at most: five, or six where the region manager's task comes first; trio draws that."""


@pytest.mark.parametrize("kind", RegionKind)
@pytest.mark.parametrize("last", range(1, ENDS + 1))
async def test_i6_an_end_cancelled_at_any_await_leaves_no_task_admits_no_peer_and_is_reported(
    kind: RegionKind, last: int
) -> None:
    model = paused()
    await with_memory_mapped(model, kind)
    before = trio.lowlevel.current_statistics().tasks_living
    with capture_logs():
        await cut_off(partial(ended, model), last)
    assert trio.lowlevel.current_statistics().tasks_living == before
    assert not model.partition.admits(model.partition.token, model.partition.owner)
    assert (misrecorded(model, LOOKED_AT), model.regions.busy) == (None, False)


async def test_an_end_has_no_more_awaits_than_it_is_cut_off_at() -> None:
    assert await awaits_of_an_end() < ENDS


async def test_the_awaits_reach_from_the_first_to_beyond_the_last() -> None:
    async def three() -> None:
        for _ in range(2):
            await trio.lowlevel.checkpoint()
        reached.append("the end")

    reached: list[str] = []
    steps = await cut_off(three)
    for last in range(1, steps + 1):
        await cut_off(three, last)
    assert (steps, reached) == (3, ["the end"])
