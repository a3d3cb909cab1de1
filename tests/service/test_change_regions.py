"""An atomic change of regions: what a guest and an operator see of it before, meanwhile and afterwards."""

from __future__ import annotations

import errno
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import Final

import pytest
import trio
from structlog.testing import capture_logs
from trio.testing import wait_all_tasks_blocked

from explorer.inspection import disorder, misrecorded
from explorer.model_partition import addition, removal
from explorer.pauses import Point
from explorer.ports import Mapped, Unmapped
from fakes.cancelling import cut_off
from fakes.counted_bounds import Counted
from fakes.model_partition import RW, ModelPartition
from fakes.one_region import GFN, PAGE, PAGES, PFN, with_region
from fakes.pauses import DrawnPauses
from fakes.running import Running
from intercept_protocol.addresses import UaddrRange
from intercept_protocol.errors import WireError
from intercept_protocol.messages import AddRegion, RegionKind, RemoveRegion, RequestedKind
from intercept_protocol.messages.vmm import LIST_LIMIT
from intercept_protocol.outcomes import Access, Answer
from interceptd.memory import fault_handler
from interceptd.memory.attempt import Busy
from interceptd.memory.region import RegionState
from interceptd.pages.mapping import Mapping

ELSEWHERE: Final = GFN + 0x100
"""Where a BAR moves to."""
ROM: Final = PAGE + 0x100
"""What else may stand behind the gfns, and where it leads to."""
ROM_PFN: Final = PFN + 0x100
LOOKED_AT = [*range(GFN - 1, GFN + PAGES + 1), *range(ELSEWHERE - 1, ELSEWHERE + PAGES + 1)]
NOTHING = [None] * PAGES
MEMORY, SHADOW = [*range(PFN, PFN + PAGES)], [*range(ROM_PFN, ROM_PFN + PAGES)]
SERVED = (Answer.MAPPED, Answer.ALREADY_MAPPED)
THE_REGION: Final = removal(GFN, PAGES, PAGE)
KINDS = pytest.mark.parametrize("kind", RegionKind)


async def with_mapped(model: ModelPartition, kind: RegionKind = RegionKind.MMIO) -> None:
    """The region, with all of its memory mapped, and the ROM."""
    await with_region(model, kind)
    await model.fault(GFN)
    await model.map_vma(ROM, PAGES, ROM_PFN)
    model.hypervisor.events.clear()


def is_consistent(model: ModelPartition) -> bool:
    """Nothing is counted, recorded, waited for or held that is not there."""
    counted = sum(region.mapped_gfns for region in model.regions.first_regions(100))
    return (
        disorder(model) is None
        and misrecorded(model, LOOKED_AT) is None
        and counted == model.mappings._record.page_count
        and model.tenant.regions.count == model.regions.region_count
        and not model.notifier._windows
        and not model.regions.busy
        and model.mappings._change is None
    )


# ------------------------------------------------ afterwards


@KINDS
async def test_a_bar_that_moves_is_reached_at_its_new_place_only(
    model: ModelPartition, kind: RegionKind
) -> None:
    await with_mapped(model, kind)
    assert await model.change_regions([THE_REGION], [addition(ELSEWHERE, PAGES, PAGE, kind)]) == [kind]
    assert model.pfns(GFN, PAGES) == NOTHING
    assert await model.fault(GFN) is Answer.NO_REGION
    assert await model.fault(ELSEWHERE) in SERVED
    assert model.pfns(ELSEWHERE, PAGES) == MEMORY
    assert is_consistent(model)


@KINDS
async def test_a_shadow_is_what_the_guest_reaches_afterwards(model: ModelPartition, kind: RegionKind) -> None:
    await with_mapped(model, kind)
    await model.change_regions([THE_REGION], [addition(GFN, PAGES, ROM, kind)])
    assert await model.fault(GFN) in SERVED
    assert model.pfns(GFN, PAGES) == SHADOW
    assert is_consistent(model)


@KINDS
async def test_two_regions_swap_their_memory(model: ModelPartition, kind: RegionKind) -> None:
    await with_mapped(model, kind)
    await model.add_region(ELSEWHERE, PAGES, ROM, kind)
    await model.change_regions(
        [THE_REGION, removal(ELSEWHERE, PAGES, ROM)],
        [addition(ELSEWHERE, PAGES, PAGE, kind), addition(GFN, PAGES, ROM, kind)],
    )
    assert [await model.fault(gfn) in SERVED for gfn in (GFN, ELSEWHERE)] == [True, True]
    assert (model.pfns(GFN, PAGES), model.pfns(ELSEWHERE, PAGES)) == (SHADOW, MEMORY)
    assert is_consistent(model)


@KINDS
async def test_a_hole_leaves_what_is_mapped_around_it(model: ModelPartition, kind: RegionKind) -> None:
    await with_mapped(model, kind)
    around = [addition(GFN, 4, PAGE, kind), addition(GFN + 6, PAGES - 6, PAGE + 6, kind)]
    await model.change_regions([THE_REGION], around)
    assert model.hypervisor.events == [Unmapped(GFN + 4, GFN + 6)]
    assert model.pfns(GFN, PAGES) == [*MEMORY[:4], None, None, *MEMORY[6:]]
    assert await model.fault(GFN + 4) is Answer.NO_REGION
    assert [region.mapped_gfns for region in model.regions.first_regions(2)] == [4, PAGES - 6]
    assert is_consistent(model)


async def test_a_region_that_grows_keeps_what_is_mapped(model: ModelPartition) -> None:
    await with_mapped(model, RegionKind.MOVABLE)
    await model.map_vma(PAGE + PAGES, 2, PFN + PAGES)
    await model.change_regions([THE_REGION], [addition(GFN, PAGES + 2, PAGE, RegionKind.MOVABLE)])
    assert model.hypervisor.events == [Mapped(GFN + PAGES, GFN + PAGES + 2, None, Access.NONE)]
    assert await model.fault(GFN + PAGES) in SERVED
    assert model.pfns(GFN, PAGES + 2) == [*MEMORY, PFN + PAGES, PFN + PAGES + 1]
    assert is_consistent(model)


async def test_the_same_regions_again_change_nothing_of_what_is_mapped(model: ModelPartition) -> None:
    await with_mapped(model, RegionKind.PINNED)
    await model.change_regions([THE_REGION], [addition(GFN, PAGES, PAGE, RegionKind.PINNED)])
    assert (model.hypervisor.events, model.pfns(GFN, PAGES)) == ([], MEMORY)
    assert is_consistent(model)


async def test_a_change_of_nothing_changes_nothing(model: ModelPartition) -> None:
    await with_mapped(model)
    assert await model.change_regions() == []
    assert (model.hypervisor.events, is_consistent(model)) == ([], True)


async def test_rights_that_are_taken_are_gone_and_those_that_are_given_are_there(
    model: ModelPartition,
) -> None:
    await with_mapped(model)
    await model.change_regions([THE_REGION], [addition(GFN, PAGES, PAGE, access=Access.READ)])
    assert await model.fault(GFN, Access.WRITE) is Answer.PERMISSION
    await model.change_regions([THE_REGION], [addition(GFN, PAGES, PAGE, access=RW)])
    assert await model.fault(GFN, Access.WRITE) in SERVED


async def test_a_dangling_region_is_followed_by_one_that_is_whole(model: ModelPartition) -> None:
    await with_mapped(model, RegionKind.PINNED)
    with capture_logs():
        await model.invalidate(PAGE + 1, 1)
    await model.change_regions([THE_REGION], [addition(GFN, PAGES, PAGE, RegionKind.PINNED)])
    assert model.pfns(GFN, PAGES) == MEMORY
    assert [region.state for region in model.regions.first_regions(1)] == [RegionState.LIVE]
    assert is_consistent(model)


async def test_a_gap_in_what_a_pinned_region_keeps_is_mapped(model: ModelPartition) -> None:
    """An invalidation of everything leaves gaps, which faults would fill."""
    await with_mapped(model, RegionKind.PINNED)
    model.notifier._pending.collapsed = True
    await model.invalidate(PAGE + 1, 1)
    assert model.pfn(GFN + 1) is None
    await model.change_regions([THE_REGION], [addition(GFN, PAGES, PAGE, RegionKind.PINNED)])
    assert model.pfns(GFN, PAGES) == MEMORY
    assert is_consistent(model)


# ------------------------------------------------ meanwhile


@KINDS
@pytest.mark.parametrize("point", [Point.UNMAP, Point.UNMAPPED])
async def test_a_fault_on_what_changes_waits_and_is_answered_for_the_new_region(
    model: ModelPartition, nursery: trio.Nursery, kind: RegionKind, point: Point
) -> None:
    """Where the old region is being taken away."""
    await with_mapped(model, kind)
    gate = model.gates.hold(point)
    change = Running(nursery, model.change_regions, [THE_REGION], [addition(GFN, PAGES, ROM, kind)])
    await gate.wait_reached()
    fault = Running(nursery, model.fault, GFN + 1)
    await wait_all_tasks_blocked()
    assert not fault.done
    gate.open()
    await change.result()
    assert await fault.result() in SERVED
    assert model.pfn(GFN + 1) == ROM_PFN + 1


async def test_faults_on_all_that_changes_wait_while_one_piece_goes_after_the_other(
    model: ModelPartition, nursery: trio.Nursery
) -> None:
    """Those on what is gone already, and those on what is still mapped."""
    await with_mapped(model)
    await model.add_region(ELSEWHERE, PAGES, ROM)
    await model.fault(ELSEWHERE)
    gates = [model.gates.hold(Point.UNMAPPED) for _ in range(2)]
    swap = [addition(GFN, PAGES, ROM), addition(ELSEWHERE, PAGES, PAGE)]
    change = Running(nursery, model.change_regions, [THE_REGION, removal(ELSEWHERE, PAGES, ROM)], swap)
    faults = []
    for gate in gates:
        await gate.wait_reached()
        faults += [Running(nursery, model.fault, gfn) for gfn in (GFN, ELSEWHERE)]
        await wait_all_tasks_blocked()
        assert not any(fault.done for fault in faults)
        assert [isinstance(model.regions.lookup(gfn, RW), Busy) for gfn in (GFN, ELSEWHERE)] == [True, True]
        gate.open()
    await change.result()
    assert [await fault.result() in SERVED for fault in faults] == [True] * 4


@pytest.mark.parametrize("kind", [RegionKind.MOVABLE, RegionKind.PINNED])
@pytest.mark.parametrize("point", [Point.MAP, Point.MAPPED])
async def test_a_fault_waits_until_what_the_new_region_needs_is_mapped(
    model: ModelPartition, nursery: trio.Nursery, kind: RegionKind, point: Point
) -> None:
    await with_mapped(model, kind)
    gate = model.gates.hold(point)
    change = Running(nursery, model.change_regions, [THE_REGION], [addition(GFN, PAGES, ROM, kind)])
    await gate.wait_reached()
    faults = [Running(nursery, model.fault, gfn) for gfn in (GFN, GFN + PAGES - 1)]
    await wait_all_tasks_blocked()
    assert [fault.done for fault in faults] == [False, False]
    gate.open()
    await change.result()
    assert [await fault.result() in SERVED for fault in faults] == [True, True]
    assert model.pfns(GFN, PAGES) == SHADOW


async def test_what_is_kept_is_served_all_the_time(model: ModelPartition, nursery: trio.Nursery) -> None:
    await with_mapped(model)
    gates = [model.gates.hold(point) for point in (Point.UNMAP, Point.MAP)]
    around = [addition(GFN, 4, PAGE), addition(GFN + 4, PAGES - 4, ROM, RegionKind.MOVABLE)]
    change = Running(nursery, model.change_regions, [THE_REGION], around)
    for gate in gates:
        await gate.wait_reached()
        assert [isinstance(model.regions.lookup(GFN + page, Access.READ), Mapping) for page in range(5)] == [
            *[True] * 4,
            False,
        ]
        gate.open()
    await change.result()


async def test_a_fault_in_what_is_kept_that_was_in_flight_is_served_by_the_new_region(
    model: ModelPartition, nursery: trio.Nursery
) -> None:
    """It began with the old one, of which nothing may be mapped any more."""
    await with_region(model)
    gate = model.gates.hold(Point.RESOLVED)
    fault = Running(nursery, model.fault, GFN)
    await gate.wait_reached()
    await model.change_regions([THE_REGION], [addition(GFN, 4, PAGE)])
    gate.open()
    assert await fault.result() is Answer.MAPPED
    assert model.pfns(GFN, PAGES) == [*MEMORY[:4], *NOTHING[4:]]
    assert is_consistent(model)


async def test_a_fault_in_flight_in_a_region_that_is_taken_back_is_served_by_the_old_one(
    model: ModelPartition, nursery: trio.Nursery
) -> None:
    await with_region(model)
    at_map, at_resolve = model.gates.hold(Point.MAP), model.gates.hold(Point.RESOLVED)
    model.hypervisor.refuse_map()
    around = [addition(GFN, 4, PAGE), addition(ELSEWHERE, PAGES, ROM, RegionKind.MOVABLE)]
    change = Running(nursery, model.change_regions, [THE_REGION], around)
    await at_map.wait_reached()
    fault = Running(nursery, model.fault, GFN)
    await at_resolve.wait_reached()
    at_map.open()
    with pytest.raises(WireError):
        await change.result()
    at_resolve.open()
    assert await fault.result() is Answer.MAPPED
    assert model.pfns(GFN, PAGES) == MEMORY
    assert is_consistent(model)


async def test_an_invalidation_of_what_is_kept_is_served_after_the_change(
    model: ModelPartition, nursery: trio.Nursery
) -> None:
    await with_mapped(model)
    gate = model.gates.hold(Point.UNMAP)
    change = Running(nursery, model.change_regions, [THE_REGION], [addition(GFN, 4, PAGE)])
    await gate.wait_reached()
    invalidation = Running(nursery, model.invalidate, PAGE, 1)
    await wait_all_tasks_blocked()
    assert not invalidation.done
    gate.open()
    await change.result()
    await invalidation.result()
    assert model.pfns(GFN, PAGES) == [None, *MEMORY[1:4], *NOTHING[4:]]
    assert is_consistent(model)


async def test_a_change_of_many_regions_does_not_compare_each_with_each_attempt(
    model: ModelPartition,
) -> None:
    """256 VPs may be in flight. It took 5 ms."""
    places = range(0, 2 * LIST_LIMIT, 2)
    await model.change_regions([], [addition(GFN + place, 1, PAGE + place) for place in places])
    attempt = Counted(UaddrRange.at_page(PAGE + LIST_LIMIT + 1, 1))
    model.notifier.open_window(attempt.pages)
    await model.change_regions([removal(GFN + place, 1, PAGE + place) for place in places])
    assert 0 < attempt.looks <= 2 * LIST_LIMIT.bit_length()


# ------------------------------------------------ pinned regions


async def test_a_pinned_region_that_is_invalidated_before_the_change_is_efault(
    model: ModelPartition, nursery: trio.Nursery
) -> None:
    await with_mapped(model)
    gate = model.gates.hold(Point.RESOLVED)
    add = [addition(ELSEWHERE, 4, PAGE), addition(GFN, PAGES, ROM, RegionKind.PINNED)]
    change = Running(nursery, model.change_regions, [THE_REGION], add)
    await gate.wait_reached()
    await model.invalidate(ROM + 1, 1)
    gate.open()
    with pytest.raises(WireError, match=r"add\[1\]: .* invalidated") as caught:
        await change.result()
    assert (caught.value.number, caught.value.details) == (errno.EFAULT, {"list": "add", "index": 1})
    assert (model.pfns(GFN, PAGES), model.hypervisor.events) == (MEMORY, [])
    assert is_consistent(model)


async def test_a_pinned_region_that_is_invalidated_after_the_change_is_dangling(
    model: ModelPartition, nursery: trio.Nursery
) -> None:
    await with_mapped(model)
    gate = model.gates.hold(Point.UNMAP)
    add = [addition(GFN, PAGES, ROM, RegionKind.PINNED)]
    change = Running(nursery, model.change_regions, [THE_REGION], add)
    await gate.wait_reached()
    with capture_logs():
        invalidation = Running(nursery, model.invalidate, ROM + 1, 1)
        await wait_all_tasks_blocked()
        gate.open()
        assert await change.result() == [RegionKind.PINNED]
        await invalidation.result()
    assert [region.state for region in model.regions.first_regions(1)] == [RegionState.DANGLING]
    assert model.pfns(GFN, 3) == [ROM_PFN, None, ROM_PFN + 2]
    assert is_consistent(model)


async def test_pinned_memory_in_more_pieces_than_one_change_may_pin_is_efault(
    model: ModelPartition, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All regions together: several may be backed by the same VMAs."""
    monkeypatch.setattr(fault_handler, "CHANGED_PIECES", 4)
    for page in range(3):
        await model.map_vma(PAGE + page, 1, PFN + 2 * page)
    once = [addition(GFN, 3, PAGE, RegionKind.PINNED), addition(ELSEWHERE, 1, PAGE, RegionKind.PINNED)]
    with pytest.raises(WireError, match=r"add\[1\]: .* may pin 4 pieces") as caught:
        await model.change_regions([], [once[0], addition(ELSEWHERE, 2, PAGE, RegionKind.PINNED)])
    assert (caught.value.number, model.regions.region_count) == (errno.EFAULT, 0)
    await model.change_regions([], once)
    assert model.hypervisor.counters().mapped_gfns == 4
    assert is_consistent(model)


# ------------------------------------------------ what is refused changes nothing


Asked = tuple[Sequence[RemoveRegion], Sequence[AddRegion]]
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
