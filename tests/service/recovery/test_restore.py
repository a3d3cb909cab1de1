"""A new partition gets what a log says, as far as it may be believed. The explorer restores at every step."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import trio

from explorer.model_partition import Parts
from explorer.successor import Successor
from fakes.model_partition import ModelPartition
from fakes.others import Others
from fakes.used_up_time import time_used_up_every
from intercept_protocol.addresses import GfnRange, UaddrRange
from intercept_protocol.messages import MmioGranularity
from intercept_protocol.outcomes import Access, Answer
from interceptd.hypervisor import HypervisorError
from interceptd.ledger.records import (
    Changing,
    Dangling,
    Gone,
    Mapped,
    Policy,
    Record,
    Removed,
    Served,
    Unmapped,
    decode,
    encode,
)
from interceptd.memory.region import RegionState
from interceptd.recovery.restore import announce, restore, settle

from .states import done, folded, length, region, vma

TURNS = 8
QUESTIONS = 32
MANY = TURNS * QUESTIONS
ALL = done("map_vma", vma(0, 64, 1000))


def added(gfn: int, count: int, page: int, kind: str = "mmio", **rights: bool) -> Record:
    return done("add_region", region(gfn, count, page, kind, **rights), {"kind": kind})


def mapped(gfn: int, count: int, page: int, access: int = 3, *, cached: bool = False) -> Record:
    return Mapped(gfn, gfn + count, page, access, "host", 1000 + page, cached=cached)


def no_access(gfn: int, count: int, page: int) -> Record:
    return Mapped(gfn, gfn + count, page, 0)


async def restored(*log: Record) -> tuple[ModelPartition, list[GfnRange]]:
    model = ModelPartition()
    return model, await restore(model.partition, folded([ALL, *log]))


async def whole(*log: Record) -> ModelPartition:
    model, strays = await restored(*log)
    fold = folded([ALL, *log])
    announce(model.partition, fold)
    await settle(model.partition, strays)
    return model


def gfns(*ranges: tuple[int, int]) -> list[GfnRange]:
    return [GfnRange(start=start, end=end) for start, end in ranges]


def record(model: ModelPartition) -> list[tuple[int, int]]:
    return [(each.start, each.end) for each in model.regions.first_mappings(99)]


def table(model: ModelPartition) -> list[tuple[int, int, Access]]:
    return [(each.start, each.end, each.access) for each in model.software.table]


RW = Access.READ | Access.WRITE


async def test_what_was_there_is_there_again() -> None:
    model = await whole(added(100, 16, 0), mapped(100, 16, 0), added(200, 4, 16, "movable"),
                        no_access(200, 4, 16), Policy("page"))  # fmt: skip
    assert [each.gfns for each in model.regions.first_regions(9)] == gfns((100, 116), (200, 204))
    assert (record(model), model.regions.first_regions(1)[0].mapped_gfns) == ([(100, 116)], 16)
    assert table(model) == [(100, 116, RW), (200, 204, Access.NONE)]
    assert model.regions.mmio_granularity is MmioGranularity.PAGE
    assert model.hypervisor.events == [], "and the hypervisor was asked for nothing"
    assert await model.fault(103) is Answer.ALREADY_MAPPED
    assert await model.fault(201) is Answer.MAPPED
    assert (model.pfn(103), model.pfn(201)) == (1003, 1017)
    assert (model.tenant.regions.count, model.tenant.mappings.count, model.tenant.vmas.count) == (2, 2, 1)


@pytest.mark.parametrize(
    ("log", "strays"),
    [
        ([added(100, 4, 0), mapped(98, 8, 62)], gfns((98, 106))),
        ([mapped(100, 4, 0)], gfns((100, 104))),
        ([added(100, 4, 0), mapped(98, 8, -2)], gfns((98, 100), (104, 106))),
        ([added(100, 4, 0), added(106, 4, 6), mapped(100, 10, 0)], gfns((104, 106))),
        ([added(100, 4, 0), added(104, 4, 32), mapped(100, 8, 0)], gfns((104, 108))),
        ([added(100, 4, 0), mapped(100, 4, 1)], gfns((100, 104))),
        ([added(100, 4, 0, writable=False), mapped(100, 4, 0)], gfns((100, 104))),
        ([added(100, 4, 0), mapped(100, 4, 0, 5)], gfns((100, 104))),
        ([added(100, 4, 0), mapped(100, 4, 0, cached=True)], gfns((100, 104))),
        ([added(100, 4, 0, "pinned"), mapped(100, 4, 0)], gfns((100, 104))),
        ([added(100, 4, 0), no_access(100, 4, 0)], gfns((100, 104))),
        ([added(100, 4, 0, "pinned"), no_access(100, 4, 0)], gfns((100, 104))),
        ([no_access(100, 4, 0)], gfns((100, 104))),
        (
            [added(100, 4, 0), mapped(100, 4, 0), Changing([(101, 102), (110, 112)])],
            gfns((101, 102), (110, 112)),
        ),
        ([added(100, 4, 0, "pinned"), mapped(100, 4, 0, cached=True), Dangling(100)], []),
        ([added(100, 4, 0, writable=False), mapped(100, 4, 0, 1)], []),
    ],
)
async def test_what_no_region_explains_is_taken_away(log: Sequence[Record], strays: list[GfnRange]) -> None:
    """By its gfn, its memory, its rights and its kind: it is a part of what was not finished."""
    model, found = await restored(*log)
    assert found == strays
    for stray in found:
        assert not model.mappings._record.touches(stray)
    await settle(model.partition, found)
    for stray in found:
        assert not model.software.table.entries(stray)
    left = sum(end - start for start, end in record(model))
    assert left == sum(each.mapped_gfns for each in model.regions.first_regions(9))
    assert left == model.software.table.gfn_count


async def test_movable_memory_is_closed_where_it_has_nothing() -> None:
    model = await whole(
        added(100, 8, 0, "movable"),
        no_access(100, 2, 0),
        mapped(104, 4, 4, cached=True),
        Changing([(105, 106)]),
    )
    assert table(model) == [
        (100, 104, Access.NONE), (104, 105, RW), (105, 106, Access.NONE), (106, 108, RW),
    ]  # fmt: skip


async def test_what_had_gone_goes_before_a_vp_is_served() -> None:
    model = await whole(added(100, 8, 0), mapped(100, 8, 0), added(200, 4, 8, "pinned"),
                        mapped(200, 4, 8, cached=True), Gone(1, 3, 5), Gone(2, 8, 9))  # fmt: skip
    assert not model.notifier.invalidation_of(2)
    assert model.notifier.invalidation_of(3)
    await model.regions.serve_pending()
    assert record(model) == [(100, 103), (105, 108), (201, 204)]
    assert model.regions.first_regions(9)[1].state is RegionState.DANGLING


async def test_what_had_gone_is_not_recorded_again_by_each_successor() -> None:
    """One that dies in its recovery would else leave twice as much to the next."""
    log = [
        ALL,
        added(100, 8, 0),
        mapped(100, 8, 0),
        *(Gone(number, number, number + 1) for number in range(1, 5)),
    ]
    frames = [encode(record) for record in log]
    left = Successor(Parts(), frames, [], [], 1).frames[len(frames) :]
    unmapped = [Unmapped(gfn, gfn + 1) for gfn in range(101, 105)]
    assert [decode(frame) for frame in left] == [*unmapped, Served(4)]


async def test_what_was_open_is_open_and_as_often() -> None:
    begin = [done("invalidate_begin", length(2, 2), inbox=inbox) for inbox in (3, 3, 4)]
    model = await whole(added(100, 8, 0), mapped(100, 8, 0), *begin)
    await model.regions.serve_pending()
    assert record(model) == [(100, 102), (104, 108)]
    for _ in range(3):
        assert model.notifier.open_at(UaddrRange.at_page(3, 1))
        model.end(2, 2)
    assert model.notifier.open_at(UaddrRange.at_page(3, 1)) is None
    assert model.notifier.open_invalidations == 0


async def test_what_cannot_be_taken_away_is_told() -> None:
    model, strays = await restored(mapped(100, 4, 0))
    model.hypervisor.refuse_unmaps()
    with pytest.raises(HypervisorError):
        await settle(model.partition, strays)


async def test_strays_are_taken_away_as_many_at_once_as_the_hypervisor_takes() -> None:
    model, strays = await restored(*(mapped(2 * gfn, 1, 0) for gfn in range(8)))
    model.hypervisor.pieces_per_call = 3
    await settle(model.partition, strays)
    assert [len(call) for call in model.hypervisor.calls] == [3, 3, 2]


async def test_strays_are_taken_away_under_the_lock() -> None:
    """An invalidation is served meanwhile, and the journal tells of one call of the hypervisor at a time."""
    model, strays = await restored(mapped(100, 4, 0))
    was_busy = []
    unmap = model.hypervisor.unmap_gpas

    async def unmap_gpas(ranges: Sequence[GfnRange]) -> None:
        was_busy.append(model.regions.busy)
        await unmap(ranges)

    model.hypervisor.unmap_gpas = unmap_gpas  # type: ignore[method-assign]
    await settle(model.partition, strays)
    assert was_busy == [True]


# ------------------------------------------------ turns


@pytest.fixture
async def others(nursery: trio.Nursery) -> Others:
    return Others(nursery)


async def test_restoring_much_takes_turns(others: Others) -> None:
    """Regions, entries, one entry over many regions, and doubt about all of them."""
    logs = (
        [added(2 * gfn, 1, 0) for gfn in range(MANY)],
        [mapped(2 * gfn, 1, gfn) for gfn in range(MANY)],
        [*(added(gfn, 1, gfn) for gfn in range(MANY)), mapped(0, MANY, 0)],
        [*(added(gfn, 1, gfn) for gfn in range(MANY)), Changing([(0, MANY)])],
    )
    for parts, log in zip((1, 1, 2, 2), logs, strict=True):
        model, fold = ModelPartition(), folded(log)
        before = others.turns
        with time_used_up_every(QUESTIONS):
            await restore(model.partition, fold)
        assert others.turns - before >= parts * (TURNS - 2)


@pytest.mark.parametrize("what", ["strays", "gaps of one region", "gaps of many"])
async def test_settling_much_takes_turns(others: Others, what: str) -> None:
    kinds = {
        "strays": [mapped(2 * gfn, 1, 0) for gfn in range(MANY)],
        "gaps of one region": [
            added(0, 2 * MANY, 0, "movable"),
            *(mapped(gfn, 1, gfn, cached=True) for gfn in range(0, 2 * MANY, 2)),
        ],
        "gaps of many": [added(gfn, 1, 0, "movable") for gfn in range(MANY)],
    }  # fmt: skip
    model, strays = await restored(*kinds[what])
    before = others.turns
    with time_used_up_every(QUESTIONS):
        await settle(model.partition, strays)
    assert others.turns - before >= TURNS - 2


async def test_discarding_a_large_fold_takes_turns(others: Others) -> None:
    fold = folded([
        *(added(gfn, 1, gfn) for gfn in range(MANY)),
        *(mapped(2 * gfn, 1, gfn) for gfn in range(4 * MANY)),
        *(done("map_vma", vma(2 * page, 1, page)) for page in range(4 * MANY)),
        *(Removed(2 * page, 2 * page + 1) for page in range(4 * MANY)),
    ])  # fmt: skip
    before = others.turns
    with time_used_up_every(QUESTIONS):
        await fold.discard()
    assert others.turns - before >= TURNS - 2
    assert (len(fold.regions), len(fold.vmas), len(fold.table), len(fold.removed)) == (0, 0, 0, 0)
