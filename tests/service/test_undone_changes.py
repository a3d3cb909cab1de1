"""A change of regions that the hypervisor refuses, or whose VMM leaves: it is undone or made whole."""

from __future__ import annotations

import errno
from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import partial
from typing import Final

import pytest
import trio
from structlog.testing import capture_logs

from explorer.inspection import misrecorded
from explorer.model_partition import addition, removal
from explorer.ports import Mapped, Unmapped
from fakes.cancelling import cut_off
from fakes.model_partition import RW, ModelPartition
from fakes.one_region import GFN, PAGE, PAGES, PFN
from fakes.pauses import DrawnPauses
from fakes.region_changes import (
    ELSEWHERE,
    MEMORY,
    ROM,
    ROM_PFN,
    SERVED,
    THE_REGION,
    Asked,
    is_consistent,
    with_mapped,
)
from intercept_protocol.errors import WireError
from intercept_protocol.messages import AddRegion, RegionKind, RemoveRegion, RequestedKind
from intercept_protocol.outcomes import Access

# ------------------------------------------------ the hypervisor refuses


BELOW: Final = GFN - 16


async def everything(model: ModelPartition, pieces_per_call: int = 1) -> Asked:
    """A partition with a region of each kind, each of which gives way to three, and that change: one keeps
    what is mapped, one replaces it, and one is where nothing was."""
    model.hypervisor.pieces_per_call = pieces_per_call
    await model.map_vma(PAGE, PAGES, PFN)
    await model.map_vma(ROM, PAGES, ROM_PFN)
    remove: list[RemoveRegion] = []
    add: list[AddRegion] = []
    for place, kind in enumerate(RegionKind):
        at = GFN + place * PAGES
        await model.add_region(at, PAGES, PAGE, kind)
        await model.fault(at)
        remove.append(removal(at, PAGES, PAGE))
        add.append(addition(at, 4, PAGE, kind))
        add.append(addition(at + 4, PAGES - 6, ROM, kind))
        add.append(addition(BELOW + 4 * place, 2, ROM, kind))
    model.hypervisor.events.clear()
    return remove, add


async def changed(model: ModelPartition, asked: Asked) -> None:
    """What a partition may run."""
    await model.change_regions(*asked)


ALL: Final = range(BELOW - 1, GFN + len(RegionKind) * PAGES + 1)
EVERY_PFN = MEMORY * len(RegionKind)


def calls_of_everything() -> list[Mapped | Unmapped]:
    async def change() -> list[Mapped | Unmapped]:
        model = ModelPartition()
        await model.change_regions(*await everything(model))
        return model.hypervisor.events

    return trio.run(change)


CALLS: Final = calls_of_everything()
MAPS: Final = [nth for nth, call in enumerate(CALLS, start=1) if isinstance(call, Mapped)]
PIECES = pytest.mark.parametrize("pieces_per_call", [1, 64])
UNMAPS: Final = [nth for nth, call in enumerate(CALLS, start=1) if isinstance(call, Unmapped)]


def test_all_that_goes_goes_before_anything_comes() -> None:
    assert (len(UNMAPS), len(MAPS), max(UNMAPS) < min(MAPS)) == (3, 4, True)


async def test_a_hypervisor_that_takes_lists_is_asked_once_for_what_goes_and_for_what_comes(
    model: ModelPartition,
) -> None:
    await model.change_regions([], [addition(2 * gfn, 1, PAGE, RegionKind.MOVABLE) for gfn in range(100)])
    model.hypervisor.pieces_per_call = 64
    model.hypervisor.calls.clear()
    await model.change_regions(
        [removal(2 * gfn, 1, PAGE) for gfn in range(100)],
        [addition(2 * gfn + 1, 1, PAGE, RegionKind.MOVABLE) for gfn in range(100)],
    )
    assert [len(call) for call in model.hypervisor.calls] == [64, 36, 64, 36]


@PIECES
@pytest.mark.parametrize("nth", MAPS)
async def test_a_map_that_is_refused_leaves_the_old_regions_and_names_the_element(
    model: ModelPartition, nth: int, pieces_per_call: int
) -> None:
    remove, add = await everything(model, pieces_per_call)
    before = [(each.gfns, each.kind, each.state) for each in model.regions.first_regions(9)]
    pinned = next(each.start_gfn for each in add if each.kind.value == "pinned")
    model.hypervisor.failing_calls = {nth}
    with capture_logs(), pytest.raises(WireError) as caught:
        await model.change_regions(remove, add)
    refused = add[caught.value.details["index"]]  # type: ignore[call-overload]
    call = CALLS[nth - 1]
    assert caught.value.details["list"] == "add"
    number = errno.EFAULT if refused.kind is RequestedKind.PINNED else errno.EIO
    assert (refused.start_gfn, caught.value.number) == (call.start, number)
    assert [(each.gfns, each.kind, each.state) for each in model.regions.first_regions(9)] == before
    assert model.pfns(pinned, PAGES) == MEMORY, "without a fault"
    assert [await model.fault(each.start_gfn + PAGES - 1) in SERVED for each in remove] == [True] * 3
    assert [model.pfn(gfn) for gfn in ALL] == [*[None] * (len(ALL) - len(EVERY_PFN) - 1), *EVERY_PFN, None]
    assert misrecorded(model, ALL) is None
    assert is_consistent(model)


@PIECES
@pytest.mark.parametrize("nth", UNMAPS)
async def test_an_unmap_that_is_refused_loses_the_partition(nth: int, pieces_per_call: int) -> None:
    model = ModelPartition()
    asked = await everything(model, pieces_per_call)
    model.hypervisor.failing_calls = {nth}
    with capture_logs() as logs, pytest.raises(WireError) as caught:
        await model.partition.run(partial(changed, model, asked))
    assert (caught.value.number, model.partition.lost) == (errno.EIO, True)
    assert "partition_lost" in [entry["event"] for entry in logs]


def calls_of_undoing() -> list[int]:
    """Those that follow the last refused map."""

    async def change() -> int:
        model = ModelPartition()
        asked = await everything(model)
        model.hypervisor.failing_calls = {MAPS[-1]}
        with pytest.raises(WireError):
            await model.change_regions(*asked)
        return len(model.hypervisor.events)

    with capture_logs():
        return [*range(MAPS[-1] + 1, trio.run(change) + 1)]


@PIECES
@pytest.mark.parametrize("nth", calls_of_undoing())
async def test_an_undoing_that_is_refused_loses_the_partition(nth: int, pieces_per_call: int) -> None:
    model = ModelPartition()
    asked = await everything(model, pieces_per_call)
    model.hypervisor.failing_calls = {MAPS[-1], nth}
    with capture_logs() as logs, pytest.raises(WireError) as caught:
        await model.partition.run(partial(changed, model, asked))
    assert (caught.value.number, model.partition.lost) == (errno.EIO, True)
    assert "partition_lost" in [entry["event"] for entry in logs]


async def test_undoing_maps_what_the_guest_cannot_be_without_and_leaves_the_rest_to_faults(
    model: ModelPartition,
) -> None:
    asked = await everything(model)
    model.hypervisor.failing_calls = {MAPS[-1]}
    with capture_logs(), pytest.raises(WireError):
        await model.change_regions(*asked)
    undone = [call for call in model.hypervisor.events[MAPS[-1] :] if isinstance(call, Mapped)]
    movable, pinned = GFN + PAGES, GFN + 2 * PAGES
    assert undone == [
        Mapped(movable + 4, movable + PAGES, None, Access.NONE),
        Mapped(pinned + 4, pinned + PAGES, PFN + 4, RW),
    ]


async def test_what_a_refused_change_mapped_of_what_it_keeps_is_counted(model: ModelPartition) -> None:
    """It fills a gap of the region that is put back, as a fault would."""
    await with_mapped(model, RegionKind.PINNED)
    model.notifier._pending.collapsed = True
    await model.invalidate(PAGE + 1, 1)
    model.hypervisor.refuse_map(nth=2)
    both = [addition(at, PAGES, PAGE, RegionKind.PINNED) for at in (GFN, ELSEWHERE)]
    with pytest.raises(WireError), capture_logs():
        await model.change_regions([THE_REGION], both)
    assert model.pfns(GFN, PAGES) == MEMORY
    assert is_consistent(model)


# ------------------------------------------------ the VMM leaves


def regions_of(model: ModelPartition) -> list[tuple[int, int, RegionKind]]:
    return [(each.gfns.start, each.uaddrs.start, each.kind) for each in model.regions.first_regions(len(ALL))]


async def refused(model: ModelPartition, asked: Asked) -> None:
    """The last map is."""
    model.hypervisor.failing_calls = {MAPS[-1]}
    with suppress(WireError):
        await changed(model, asked)


async def awaits_of(call: Callable[[ModelPartition, Asked], Awaitable[None]]) -> int:
    """Of a call that is not cut off."""
    model = paused()
    asked = await everything(model)
    with capture_logs():
        return await cut_off(partial(call, model, asked))


def paused() -> ModelPartition:
    return ModelPartition(pauses=DrawnPauses([1]))


AWAITS: Final = trio.run(awaits_of, changed)
AWAITS_OF_REFUSED: Final = trio.run(awaits_of, refused)


def test_a_change_has_awaits_before_and_during_each_of_its_calls() -> None:
    assert 2 * len(CALLS) < AWAITS
    assert AWAITS_OF_REFUSED > AWAITS


@pytest.mark.parametrize("last", range(1, AWAITS + 1))
async def test_a_change_that_is_cancelled_at_any_await_is_made_whole_or_not_at_all(last: int) -> None:
    model, another = paused(), paused()
    asked = await everything(model)
    before = regions_of(model)
    await another.change_regions(*await everything(another))
    await cut_off(partial(changed, model, asked), last)
    assert regions_of(model) in (before, regions_of(another))
    assert misrecorded(model, ALL) is None
    assert is_consistent(model)
    assert [await model.fault(each.start_gfn) in SERVED for each in asked[0]] == [True] * 3


@pytest.mark.parametrize("last", range(1, AWAITS_OF_REFUSED + 1))
async def test_a_refused_change_that_is_cancelled_at_any_await_leaves_the_old_regions(last: int) -> None:
    model = paused()
    asked = await everything(model)
    before = regions_of(model)
    with capture_logs():
        await cut_off(partial(refused, model, asked), last)
    assert regions_of(model) == before
    assert misrecorded(model, ALL) is None
    assert is_consistent(model)
