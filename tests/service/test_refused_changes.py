"""A change of regions that is refused: it names the element, and changes nothing."""

from __future__ import annotations

import errno
from typing import Final

import pytest
import trio
from structlog.testing import capture_logs

from explorer.model_partition import addition, removal
from explorer.pauses import Point
from fakes.model_partition import ModelPartition
from fakes.one_region import GFN, PAGE, PAGES
from fakes.region_changes import (
    ELSEWHERE,
    MEMORY,
    NOTHING,
    ROM,
    THE_REGION,
    Asked,
    is_consistent,
    with_mapped,
)
from fakes.running import Running
from intercept_protocol.errors import WireError
from intercept_protocol.messages import RegionKind
from intercept_protocol.outcomes import Answer

REFUSED: Final[dict[str, tuple[Asked, int, dict[str, object]]]] = {
    "no region starts there": (
        ([THE_REGION, removal(GFN + 1, 1, PAGE)], []),
        errno.ENOENT,
        {"start_gfn": GFN + 1, "list": "remove", "index": 1},
    ),
    "a region that is removed already": (
        ([THE_REGION, THE_REGION], []),
        errno.ENOENT,
        {"start_gfn": GFN, "list": "remove", "index": 1},
    ),
    "a region that is removed already, by another length": (
        ([THE_REGION, removal(GFN, PAGES - 1, PAGE)], []),
        errno.ENOENT,
        {"start_gfn": GFN, "list": "remove", "index": 1},
    ),
    "a region of another length": (
        ([removal(GFN, PAGES - 1, PAGE)], []),
        errno.EINVAL,
        {"field": "page_count", "list": "remove", "index": 0},
    ),
    "a range that is none": (
        ([THE_REGION, removal(GFN, 0, PAGE)], []),
        errno.EINVAL,
        {"field": "page_count", "list": "remove", "index": 1},
    ),
    "an overlap with what stays": (
        ([], [addition(ELSEWHERE, 1, PAGE), addition(GFN + PAGES - 1, 2, PAGE)]),
        errno.EEXIST,
        {"start_gfn": GFN, "page_count": PAGES, "list": "add", "index": 1},
    ),
    "an overlap from below with what stays": (
        ([], [addition(GFN - 1, 2, PAGE)]),
        errno.EEXIST,
        {"start_gfn": GFN, "page_count": PAGES, "list": "add", "index": 0},
    ),
    "an overlap with another": (
        ([THE_REGION], [addition(GFN, 2, PAGE), addition(GFN - 1, 2, PAGE)]),
        errno.EEXIST,
        {"start_gfn": GFN, "page_count": 2, "list": "add", "index": 1},
    ),
    "a kind that nothing tells": (
        ([THE_REGION], [addition(GFN, 2, PAGE), addition(ELSEWHERE, 2, PAGE - 2, None)]),
        errno.EINVAL,
        {"field": "start_uaddr", "list": "add", "index": 1},
    ),
    "a pinned region over a hole": (
        ([THE_REGION], [addition(GFN, 2, PAGE), addition(ELSEWHERE, 2, PAGE - 2, RegionKind.PINNED)]),
        errno.EFAULT,
        {"list": "add", "index": 1},
    ),
}


@pytest.mark.parametrize("asked", REFUSED)
async def test_what_is_refused_names_the_element_and_changes_nothing(
    model: ModelPartition, asked: str
) -> None:
    (remove, add), number, details = REFUSED[asked]
    await with_mapped(model)
    with pytest.raises(WireError) as caught:
        await model.change_regions(remove, add)
    assert (caught.value.number, caught.value.details) == (number, details)
    assert caught.value.message.startswith(f"{details['list']}[{details['index']}]: ")
    assert (model.hypervisor.events, model.pfns(GFN, PAGES)) == ([], MEMORY)
    assert is_consistent(model)


async def test_an_added_region_may_overlap_what_is_removed_and_touch_what_stays(
    model: ModelPartition,
) -> None:
    await with_mapped(model)
    await model.add_region(GFN + PAGES, 1, ROM)
    await model.change_regions([THE_REGION], [addition(GFN - 1, PAGES + 1, PAGE - 1)])
    assert model.regions.region_count == 2


@pytest.mark.parametrize("limit", ["regions_per_partition", "regions_per_uid"])
async def test_the_limits_of_regions_count_what_is_left_afterwards(
    model: ModelPartition, monkeypatch: pytest.MonkeyPatch, limit: str
) -> None:
    await with_mapped(model)
    if limit == "regions_per_partition":
        monkeypatch.setattr(model.regions._regions, "_limit", lambda: 1)
    else:
        monkeypatch.setattr(model.tenant.regions, "_limit", lambda: 1)
    both = [addition(GFN, 1, PAGE), addition(ELSEWHERE, 1, PAGE)]
    with pytest.raises(WireError) as caught:
        await model.change_regions([THE_REGION], both)
    assert (caught.value.number, caught.value.details) == (errno.ENOSPC, {"limit": limit})
    assert is_consistent(model)
    await model.change_regions([THE_REGION], both[1:])
    assert await model.fault(ELSEWHERE) is Answer.MAPPED


async def test_what_exceeds_a_lowered_limit_may_be_exchanged(
    model: ModelPartition, monkeypatch: pytest.MonkeyPatch
) -> None:
    await with_mapped(model)
    await model.add_region(ELSEWHERE, PAGES, PAGE)
    monkeypatch.setattr(model.regions._regions, "_limit", lambda: 1)
    monkeypatch.setattr(model.tenant.regions, "_limit", lambda: 1)
    await model.change_regions([THE_REGION], [addition(GFN, PAGES, ROM)])
    assert model.regions.region_count == 2


async def test_room_for_regions_that_come_is_kept_while_others_go(
    model: ModelPartition, nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another partition of the uid cannot take it meanwhile."""
    await with_mapped(model)
    monkeypatch.setattr(model.tenant.regions, "_limit", lambda: 2)
    gate = model.gates.hold(Point.UNMAP)
    both = [addition(GFN, 1, ROM), addition(ELSEWHERE, 1, PAGE)]
    change = Running(nursery, model.change_regions, [THE_REGION], both)
    await gate.wait_reached()
    assert not model.tenant.regions.has_room(1)
    gate.open()
    await change.result()
    assert is_consistent(model)


MAPPING_LIMITS = pytest.mark.parametrize("limit", ["mappings_per_partition", "mappings_per_uid"])


def limit_mappings(model: ModelPartition, monkeypatch: pytest.MonkeyPatch, limit: str, count: int) -> None:
    counted = model.mappings if limit == "mappings_per_partition" else model.tenant.mappings
    monkeypatch.setattr(counted, "_limit", lambda: count)


@MAPPING_LIMITS
async def test_a_mapping_is_not_cut_in_two_where_there_may_be_no_more(
    model: ModelPartition, monkeypatch: pytest.MonkeyPatch, limit: str
) -> None:
    """Or cuts, and joins of the regions, would make ever more of it."""
    await with_mapped(model)
    limit_mappings(model, monkeypatch, limit, 1)
    hole = [addition(GFN, 4, PAGE), addition(GFN + 6, PAGES - 6, PAGE + 6)]
    with pytest.raises(WireError) as caught:
        await model.change_regions([THE_REGION], hole)
    assert (caught.value.number, caught.value.details) == (errno.ENOSPC, {"limit": limit})
    assert (model.pfns(GFN, PAGES), is_consistent(model)) == (MEMORY, True)
    await model.change_regions([THE_REGION], hole[:1])
    assert (model.pfns(GFN, PAGES), is_consistent(model)) == ([*MEMORY[:4], *NOTHING[4:]], True)


@MAPPING_LIMITS
async def test_a_mapping_is_cut_in_two_where_there_may_be_just_two(
    model: ModelPartition, monkeypatch: pytest.MonkeyPatch, limit: str
) -> None:
    await with_mapped(model)
    limit_mappings(model, monkeypatch, limit, 2)
    await model.change_regions([THE_REGION], [addition(GFN, 4, PAGE), addition(GFN + 6, PAGES - 6, PAGE + 6)])
    assert model.pfns(GFN, PAGES) == [*MEMORY[:4], None, None, *MEMORY[6:]]


@MAPPING_LIMITS
async def test_a_change_that_cuts_no_mapping_is_made_beyond_a_lowered_limit(
    model: ModelPartition, monkeypatch: pytest.MonkeyPatch, limit: str
) -> None:
    await with_mapped(model)
    limit_mappings(model, monkeypatch, limit, 0)
    await model.change_regions([THE_REGION], [addition(GFN, 4, PAGE)])
    assert (model.pfns(GFN, PAGES), is_consistent(model)) == ([*MEMORY[:4], *NOTHING[4:]], True)


@MAPPING_LIMITS
async def test_a_change_that_a_lowered_limit_refuses_gives_back_what_it_took(
    model: ModelPartition, monkeypatch: pytest.MonkeyPatch, limit: str
) -> None:
    """Of a pinned region, which faults would not map again."""
    await with_mapped(model, RegionKind.PINNED)
    limit_mappings(model, monkeypatch, limit, 0)
    with pytest.raises(WireError, match="mappings"), capture_logs():
        await model.change_regions([THE_REGION], [addition(ELSEWHERE, PAGES, ROM, RegionKind.PINNED)])
    assert (model.pfns(GFN, PAGES), is_consistent(model)) == (MEMORY, True)
