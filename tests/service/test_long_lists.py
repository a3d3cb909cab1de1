"""A list whose length a client chooses never lies in one block: growing it would move all of it at once."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator, Sequence

import pytest

from explorer.model_partition import addition, removal
from fakes.model_partition import RW, ModelPartition
from intercept_protocol.addresses import GfnRange, UaddrRange
from intercept_protocol.errors import WireError
from intercept_protocol.messages import RegionKind
from interceptd.memory.fault_handler import CHANGED_PIECES
from interceptd.memory.long_lists import PART, LongList
from interceptd.memory.region import KindOrigin, Region, RegionState
from interceptd.pages.mapping import Mapping

MANY = CHANGED_PIECES
POINTER = 8


@pytest.mark.parametrize("count", [0, 1, PART, PART + 1, 3 * PART])
async def test_it_is_a_list(count: int) -> None:
    items = LongList[int]()
    for item in range(0, count - 1, 2):
        items.extend([item, item + 1])
    if count % 2:
        items.append(count - 1)
    assert list(items) == list(range(count))
    assert len(items) == count
    await items.free()
    assert not list(items)
    assert len(items) == 0


def pinned(page_count: int) -> Region:
    return Region(
        GfnRange.of(0, page_count),
        UaddrRange.at_page(0, page_count),
        RegionKind.PINNED,
        KindOrigin.STATED,
        RW,
        RegionState.POPULATING,
    )


@pytest.fixture
def traced() -> Iterator[None]:
    tracemalloc.start()
    yield
    tracemalloc.stop()


def largest_block() -> int:
    """Bytes of the largest block that code of `interceptd.memory` holds."""
    own = tracemalloc.Filter(True, "*/interceptd/memory/*")
    return max(trace.size for trace in tracemalloc.take_snapshot().filter_traces([own]).traces)


@pytest.mark.usefixtures("traced")
async def test_no_list_of_what_is_pinned_lies_in_one_block(
    model: ModelPartition, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither of what backs a region, nor of what was mapped, nor of what a change took away."""
    for page in range(MANY):
        await model.map_vma(page, 1, 2 * page)
    found: list[int] = []
    map_gpas = model.hypervisor.map_gpas

    async def looking(mappings: Sequence[Mapping]) -> None:
        await map_gpas(mappings)
        if mappings[-1].end == MANY:
            found.append(largest_block())

    monkeypatch.setattr(model.hypervisor, "map_gpas", looking)
    region = pinned(MANY)
    await model.regions.add(region)
    await model.faults.populate(region)
    await model.regions.remove(region)
    await model.change_regions([], [addition(0, MANY, 0, RegionKind.PINNED)])
    model.hypervisor.refuse_map()
    with pytest.raises(WireError):
        await model.change_regions([removal(0, MANY, 0)], [addition(0, 1, 1, RegionKind.MOVABLE)])
    assert len(found) == 3
    assert max(found) < MANY * POINTER / 4
