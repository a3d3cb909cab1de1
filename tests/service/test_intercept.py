"""The fault handler on address spaces that are slow, silent, or initially incomplete."""

from __future__ import annotations

import errno
import math

import pytest
import trio
import trio.testing
from msgspec.structs import replace

from explorer.model_partition import touch
from explorer.pauses import Point
from fakes.model_partition import TIMEOUT, ModelPartition
from fakes.one_region import GFN, PAGE, PAGES, PFN, with_region
from fakes.running import Running
from intercept_protocol.addresses import UaddrRange
from intercept_protocol.errors import WireError
from intercept_protocol.messages import RegionKind
from intercept_protocol.outcomes import Access, Answer
from interceptd.address_space import AddressSpace, Caller, Undecided
from interceptd.memory.fault_handler import UNDECIDED_PAUSE, FaultHandler
from interceptd.pages.mapping import Extent


class LiveLike:
    """Like live memory: may block, says what a VMA is only when asked, and may not answer at all.

    `resolved` are the pages that were asked for, `asked` those whose kind was.
    """

    may_block = True

    def __init__(self, inner: AddressSpace, *, silent: bool = False, telling: bool = False) -> None:
        self._inner = inner
        self._silent = silent
        self._telling = telling
        self.resolved: list[int] = []
        self.asked: list[int] = []

    @property
    def vma_count(self) -> int:
        return self._inner.vma_count

    def drain_nowait(self) -> bool:
        return self._inner.drain_nowait()

    async def resolve(
        self, page: int, window: UaddrRange, region: UaddrRange, caller: Caller = Caller.GUEST
    ) -> Extent | None:
        self.resolved.append(page)
        if self._silent:
            raise Undecided("nobody answered", errno.ETIMEDOUT)
        extent = await self._inner.resolve(page, window, region, caller)
        return extent and replace(extent, io=extent.io if self._telling else None)

    async def is_io(self, page: int, caller: Caller = Caller.GUEST) -> bool | None:
        self.asked.append(page)
        return await self._inner.is_io(page, caller)


def handler(model: ModelPartition, address_space: AddressSpace) -> FaultHandler:
    return FaultHandler(model.regions, address_space, TIMEOUT)


def kicked(_unless: Answer) -> Answer:
    """What a VP that keeps a kick says when it is about to wait."""
    return Answer.KICKED


def relied_on(model: ModelPartition) -> int:
    """Attempts that an invalidation finds, now that none is under way."""
    before = model.notifier.stale_windows
    model.notifier.mark_stale(UaddrRange.at_page(PAGE, PAGES))
    return model.notifier.stale_windows - before


# ------------------------------------------------ a kept kick


async def test_a_kept_kick_answers_before_a_question_that_may_block(model: ModelPartition) -> None:
    await with_region(model)
    answer = await touch(handler(model, LiveLike(model.declared)), GFN, Access.READ, kicked)
    assert (answer, relied_on(model), model.pfn(GFN)) == (Answer.KICKED, 0, None)


async def test_a_kept_kick_answers_before_a_wait_for_anothers_map(
    model: ModelPartition, nursery: trio.Nursery
) -> None:
    await with_region(model)
    await model.map_vma(PAGE + PAGES, 1, PFN + PAGES)
    await model.add_region(GFN + PAGES, 1, PAGE + PAGES)
    gate = model.gates.hold(Point.MAP)
    other = Running(nursery, model.fault, GFN + PAGES)
    await gate.wait_reached()
    assert await touch(model.faults, GFN, Access.READ, kicked) is Answer.KICKED
    gate.open()
    assert await other.result() is Answer.MAPPED


async def test_a_kept_kick_stays_kept_if_nothing_waits(model: ModelPartition) -> None:
    await with_region(model)
    assert await touch(model.faults, GFN, Access.READ, kicked) is Answer.MAPPED


async def test_a_fault_without_a_kept_kick_waits_for_what_may_block(model: ModelPartition) -> None:
    await with_region(model)
    assert await touch(handler(model, LiveLike(model.declared)), GFN, Access.READ) is Answer.MAPPED


# ------------------------------------------------ no answer


async def test_a_fault_that_cannot_be_resolved_in_time_is_retry(model: ModelPartition) -> None:
    """Nothing was decided, so it is not forwarded."""
    await with_region(model)
    space = LiveLike(model.declared, silent=True)
    assert await touch(handler(model, space), GFN, Access.READ) is Answer.CONTENDED
    assert (space.resolved, relied_on(model)) == ([PAGE], 0)


async def test_an_undecided_fault_is_answered_after_a_pause_in_which_it_relies_on_nothing(
    model: ModelPartition, nursery: trio.Nursery, autojump_clock: trio.testing.MockClock
) -> None:
    """A VP that asks again at once keeps no worker busy, and an invalidate does not wait for the pause."""
    await with_region(model)
    autojump_clock.autojump_threshold = math.inf
    fault = Running(nursery, touch, handler(model, LiveLike(model.declared, silent=True)), GFN, Access.READ)
    await trio.testing.wait_all_tasks_blocked()
    assert (fault.done, relied_on(model)) == (False, 0)
    autojump_clock.jump(UNDECIDED_PAUSE)
    assert await fault.result() is Answer.CONTENDED


async def test_a_pinned_add_that_cannot_be_resolved_in_time_is_retried_and_leaves_nothing(
    model: ModelPartition,
) -> None:
    """Nothing was found out about its memory, so it is not EFAULT."""
    await with_region(model, RegionKind.PINNED)
    region = model.regions.first_regions(1)[0]
    with pytest.raises(WireError, match="cannot be populated: nobody answered") as refused:
        await handler(model, LiveLike(model.declared, silent=True)).populate(region)
    assert (refused.value.number, model.regions.region_count) == (errno.ETIMEDOUT, 0)
    assert model.pfns(GFN, PAGES) == [None] * PAGES


# ------------------------------------------------ what a VMA is


async def test_an_inferred_kind_is_checked_again_by_asking_where_resolving_does_not_tell(
    model: ModelPartition,
) -> None:
    await with_region(model, kind=None, io=True)
    space = LiveLike(model.declared)
    assert await touch(handler(model, space), GFN + 3, Access.READ) is Answer.MAPPED
    assert space.asked == [PAGE + 3]


async def test_an_inferred_kind_that_no_longer_fits_is_unbacked_where_resolving_does_not_tell(
    model: ModelPartition,
) -> None:
    await with_region(model, kind=None, io=True)
    await model.unmap_vma(PAGE, PAGES)
    await model.map_vma(PAGE, PAGES, PFN, io=False)
    assert await touch(handler(model, LiveLike(model.declared)), GFN, Access.READ) is Answer.UNBACKED


async def test_an_inferred_kind_is_not_queried_if_resolving_gives_it(model: ModelPartition) -> None:
    await with_region(model, kind=None, io=True)
    space = LiveLike(model.declared, telling=True)
    assert await touch(handler(model, space), GFN, Access.READ) is Answer.MAPPED
    assert space.asked == []


async def test_a_stated_kind_is_not_queried(model: ModelPartition) -> None:
    """On live memory it costs what smaps costs."""
    await with_region(model)
    space = LiveLike(model.declared)
    assert await touch(handler(model, space), GFN, Access.READ) is Answer.MAPPED
    assert space.asked == []


# ------------------------------------------------ populating


async def test_populating_leaves_no_attempt_behind(model: ModelPartition) -> None:
    await with_region(model, RegionKind.PINNED)
    assert relied_on(model) == 0


@pytest.mark.parametrize(
    ("access", "why"),
    [
        (None, "nothing is mapped at uaddr 0x9004000"),
        (Access.WRITE, "uaddr 0x9004000 may not be read"),
    ],
)
async def test_a_pinned_region_with_a_bad_page_is_refused_by_its_uaddr(
    model: ModelPartition, access: Access | None, why: str
) -> None:
    await model.map_vma(PAGE, 4, PFN)
    for rights in [access] if access is not None else []:
        await model.map_vma(PAGE + 4, PAGES - 4, PFN + 4, rights)
    with pytest.raises(WireError, match=why):
        await model.add_region(GFN, PAGES, PAGE, RegionKind.PINNED)
