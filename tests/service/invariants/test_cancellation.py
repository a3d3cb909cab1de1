"""I10: a task that is cancelled at any checkpoint leaves nothing that nobody knows of.

Every port call passes a checkpoint before and behind it, and the call is cancelled after n checkpoints, for
every n that it has.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import pytest
import trio
from structlog.testing import capture_logs

from fakes.model_partition import ModelPartition
from fakes.pauses import DrawnPauses
from fakes.running import Running
from intercept_protocol.addresses import UaddrRange
from intercept_protocol.messages import RegionKind
from intercept_protocol.outcomes import Answer
from interceptctl.explore.inspection import misrecorded

GFN, PAGE, PFN, PAGES = 0x100, 0x9000, 0x7000, 16
LOOKED_AT = range(GFN - 1, GFN + PAGES + 1)
CHECKPOINTS = range(24)
"""More than any call below has: the last ones are not cut off at all."""
Call = Callable[[ModelPartition], Awaitable[object]]


async def with_region(model: ModelPartition, kind: RegionKind) -> None:
    await model.map_vma(PAGE, PAGES, PFN)
    await model.add_region(GFN, PAGES, PAGE, kind)


async def cut_off(model: ModelPartition, call: Call, checkpoints: int) -> bool:
    """Cancel the call after so many checkpoints; whether that cut it off."""
    async with trio.open_nursery() as nursery:
        running = Running(nursery, call, model)
        for _ in range(checkpoints):
            await trio.lowlevel.checkpoint()
        with capture_logs():
            return await running.cancel()


def pausing() -> ModelPartition:
    return ModelPartition(pauses=DrawnPauses([1]))


def windows(model: ModelPartition) -> int:
    return len(model.notifier._windows)


@pytest.mark.parametrize("checkpoints", CHECKPOINTS)
@pytest.mark.parametrize("kind", [RegionKind.MMIO, RegionKind.MOVABLE])
async def test_i10_a_fault_cancelled_at_any_checkpoint_leaves_record_and_slat_agreeing(
    kind: RegionKind, checkpoints: int
) -> None:
    async with pausing().running() as model:
        await with_region(model, kind)
        await cut_off(model, lambda model: model.fault(GFN), checkpoints)
        assert (misrecorded(model, LOOKED_AT), windows(model)) == (None, 0)
        assert await model.fault(GFN) in {Answer.MAPPED, Answer.ALREADY_MAPPED}
        assert model.pfns(GFN, PAGES) == [*range(PFN, PFN + PAGES)]
        await model.unmap_vma(PAGE, PAGES)
        assert model.pfns(GFN, PAGES) == [None] * PAGES


@pytest.mark.parametrize("checkpoints", CHECKPOINTS)
@pytest.mark.parametrize("kind", RegionKind)
async def test_i10_an_add_cancelled_at_any_checkpoint_is_whole_or_nothing(
    kind: RegionKind, checkpoints: int
) -> None:
    async with pausing().running() as model:
        await model.map_vma(PAGE, PAGES, PFN)
        await cut_off(model, lambda model: model.add_region(GFN, PAGES, PAGE, kind), checkpoints)
        assert (misrecorded(model, LOOKED_AT), windows(model)) == (None, 0)
        await model.regions.close()
        assert model.hypervisor.counters().slat_extents == 0
        await model.add_region(GFN, PAGES, PAGE, kind)
        assert await model.fault(GFN) in {Answer.MAPPED, Answer.ALREADY_MAPPED}


@pytest.mark.parametrize("checkpoints", CHECKPOINTS)
@pytest.mark.parametrize("kind", RegionKind)
async def test_i10_a_remove_cancelled_at_any_checkpoint_is_whole_or_nothing(
    kind: RegionKind, checkpoints: int
) -> None:
    async with pausing().running() as model:
        await with_region(model, kind)
        await model.fault(GFN)
        await cut_off(model, lambda model: model.remove_region(GFN, PAGES, PAGE), checkpoints)
        assert misrecorded(model, LOOKED_AT) is None
        reached = {0: [None] * PAGES, 1: [*range(PFN, PFN + PAGES)]}
        assert model.pfns(GFN, PAGES) == reached[model.regions.region_count]


@pytest.mark.parametrize("checkpoints", CHECKPOINTS)
async def test_i10_a_manager_cancelled_at_any_checkpoint_acknowledges_only_what_it_did(
    checkpoints: int,
) -> None:
    model = pausing()
    await with_region(model, RegionKind.MMIO)
    await model.fault(GFN)
    batch = model.notifier.invalidate(UaddrRange(PAGE, PAGE + PAGES))
    await cut_off(model, lambda model: model.regions.run(), checkpoints)
    reached = {False: [*range(PFN, PFN + PAGES)], True: [None] * PAGES}
    assert model.pfns(GFN, PAGES) == reached[batch.done.is_set()]
    assert misrecorded(model, LOOKED_AT) is None


async def test_i10_the_checkpoints_tried_reach_from_the_first_to_beyond_the_last() -> None:
    async with pausing().running() as model:
        await with_region(model, RegionKind.MOVABLE)
        assert await cut_off(model, lambda model: model.fault(GFN), CHECKPOINTS[0])
        assert not await cut_off(model, lambda model: model.fault(GFN), CHECKPOINTS[-1])
