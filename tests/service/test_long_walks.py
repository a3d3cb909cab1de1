"""Long walks let other tasks run whenever their uid's time is used up, here after every `QUESTIONS` pieces.

A turn is counted by a task of another's that is ready all the time. Taking a lock, and the order in which
trio runs what is ready, give or take two turns; a walk that takes none is far below the counts asserted.
"""

from __future__ import annotations

import pytest
import trio

from fakes.model_partition import RW, ModelPartition
from fakes.others import Others
from fakes.used_up_time import time_used_up_every
from intercept_protocol.addresses import GfnRange, UaddrRange
from intercept_protocol.messages import RegionKind
from intercept_protocol.outcomes import Access, Answer
from interceptd.memory.region import KindOrigin, Region, RegionState
from interceptd.pages.mapping import HOST_BACKING, Extent, Frame

TURNS = 8
QUESTIONS = 32
FEW = QUESTIONS // 2
MANY = TURNS * QUESTIONS


def scattered(count: int) -> list[Extent]:
    """Pages of which no two can be one mapping."""
    return [
        Extent(UaddrRange.at_page(page, 1), Frame(HOST_BACKING, 2 * page), Access.READ, None)
        for page in range(count)
    ]


async def pinned(model: ModelPartition, page_count: int) -> Region:
    """In the list, and not populated."""
    region = Region(
        GfnRange.of(0, page_count),
        UaddrRange.at_page(0, page_count),
        RegionKind.PINNED,
        KindOrigin.STATED,
        RW,
        RegionState.POPULATING,
    )
    await model.regions.add(region)
    return region


async def invalidated(model: ModelPartition, pages: int) -> None:
    """Served by this task, whose time it takes."""
    model.notifier.invalidate(UaddrRange.at_page(0, pages))
    await model.regions.serve_pending()


async def committed(model: ModelPartition, extents: list[Extent]) -> Answer | None:
    region = await pinned(model, len(extents))
    return await model.regions.commit(model.regions.begin_whole(region), extents)


async def test_a_commit_of_many_gaps_takes_turns(model: ModelPartition, nursery: trio.Nursery) -> None:
    others = Others(nursery)
    with time_used_up_every(QUESTIONS):
        assert await committed(model, scattered(MANY)) is Answer.MAPPED
    assert others.turns >= TURNS - 2
    assert len(model.hypervisor.events) == MANY


async def test_a_commit_of_few_gaps_does_not_yield(model: ModelPartition, nursery: trio.Nursery) -> None:
    """A checkpoint a map would double what a fault costs."""
    region = await pinned(model, FEW)
    attempt = model.regions.begin_whole(region)
    others = Others(nursery)
    with time_used_up_every(QUESTIONS):
        await model.regions.commit(attempt, scattered(FEW))
    assert others.turns <= 1


async def test_the_undoing_of_many_maps_takes_turns(model: ModelPartition, nursery: trio.Nursery) -> None:
    model.hypervisor.refuse_map(nth=MANY)
    others = Others(nursery)
    with time_used_up_every(QUESTIONS):
        assert await committed(model, scattered(MANY)) is Answer.HYPERVISOR_ERROR
    assert others.turns >= 2 * TURNS - 3
    assert model.hypervisor.counters().slat_extents == 0


@pytest.mark.parametrize("change", ["invalidate", "remove", "close"])
async def test_revoking_many_mappings_of_one_region_yields(
    model: ModelPartition, nursery: trio.Nursery, change: str
) -> None:
    await committed(model, scattered(MANY))
    region = model.regions.first_regions(1)[0]
    changes = {
        "invalidate": lambda: invalidated(model, MANY),
        "remove": lambda: model.regions.remove(region),
        "close": model.regions.close,
    }
    others = Others(nursery)
    with time_used_up_every(2):  # it asks after each part
        await changes[change]()
    assert others.turns >= TURNS - 2
    assert model.hypervisor.counters().mapped_gfns == 0


async def test_closing_many_regions_takes_turns(model: ModelPartition, nursery: trio.Nursery) -> None:
    for gfn in range(MANY):
        await model.add_region(gfn, 1, gfn)
    others = Others(nursery)
    with time_used_up_every(QUESTIONS):
        await model.regions.close()
    assert others.turns >= TURNS - 2


async def test_an_invalidation_of_many_regions_takes_turns(
    model: ModelPartition, nursery: trio.Nursery
) -> None:
    for gfn in range(MANY):
        await model.add_region(gfn, 1, 0)
    others = Others(nursery)
    with time_used_up_every(QUESTIONS):
        await invalidated(model, 1)
    assert others.turns >= TURNS - 2


async def test_populating_from_many_vmas_takes_turns_between_the_questions(
    model: ModelPartition, nursery: trio.Nursery
) -> None:
    for page in range(MANY):
        await model.map_vma(page, 1, 2 * page)
    region = await pinned(model, MANY)
    others = Others(nursery)
    with time_used_up_every(QUESTIONS):
        await model.faults.populate(region)
    assert others.turns >= 2 * TURNS - 3, "between the questions, and then between the maps"
    assert len(model.hypervisor.events) == MANY


async def test_populating_from_few_vmas_does_not_yield(model: ModelPartition, nursery: trio.Nursery) -> None:
    for page in range(FEW):
        await model.map_vma(page, 1, 2 * page)
    region = await pinned(model, FEW)
    others = Others(nursery)
    with time_used_up_every(QUESTIONS):
        await model.faults.populate(region)
    assert others.turns <= 1
