"""A hypervisor that takes lists: what goes is asked for together, and the record stays right."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable

import pytest
import trio
from msgspec.structs import replace
from structlog.testing import capture_logs

from explorer.inspection import misrecorded
from explorer.pauses import Point
from fakes.model_partition import RW, ModelPartition
from fakes.one_region import GFN, PAGE, PFN
from fakes.running import Running
from intercept_protocol.addresses import GfnRange, UaddrRange
from intercept_protocol.messages import RegionKind
from intercept_protocol.outcomes import Access, Answer
from interceptd.errors import PartitionLost
from interceptd.hypervisor import HypervisorError
from interceptd.memory.guest_mappings import GuestMappings
from interceptd.memory.region import KindOrigin, Region
from interceptd.pages.mapping import Frame, Mapping
from interceptd.quota import Quota

MOST = 64
"""Pieces that the hypervisor takes at once."""
MMIO, MOVABLE, PINNED = RegionKind.MMIO, RegionKind.MOVABLE, RegionKind.PINNED


@pytest.fixture
def model(model: ModelPartition) -> ModelPartition:
    model.hypervisor.pieces_per_call = MOST
    return model


async def with_regions(model: ModelPartition, count: int, kind: RegionKind = MMIO, gfn: int = GFN) -> None:
    """So many regions of a page, with a gap between any two, all of them mapped. Each page has memory of its
    own, so no two could be one mapping."""
    for page in range(0, 2 * count, 2):
        await model.map_vma(PAGE + gfn + page, 1, PFN + 2 * (gfn + page))
        await model.add_region(gfn + page, 1, PAGE + gfn + page, kind)
        if kind is not PINNED:
            assert await model.fault(gfn + page) is Answer.MAPPED
    model.hypervisor.calls.clear()


async def with_scattered(model: ModelPartition, count: int, kind: RegionKind = MMIO) -> None:
    """One region, of which every other page is mapped."""
    for page in range(0, 2 * count, 2):
        await model.map_vma(PAGE + page, 1, PFN + page)
    await model.add_region(GFN, 2 * count, PAGE, kind)
    for page in range(0, 2 * count, 2):
        await model.fault(GFN + page)
    model.hypervisor.calls.clear()


def sizes(model: ModelPartition) -> list[int]:
    """How many pieces each call had."""
    return [len(pieces) for pieces in model.hypervisor.calls]


async def invalidated(model: ModelPartition) -> None:
    await model.invalidate(PAGE, 1 << 20)


# ------------------------------------------------ how many calls


@pytest.mark.parametrize("kind", [MMIO, MOVABLE, PINNED])
@pytest.mark.parametrize(("count", "calls"), [(1, [1]), (MOST, [64]), (MOST + 1, [64, 1])])
async def test_an_invalidation_over_many_regions_is_a_call_for_64_pieces(
    model: ModelPartition, kind: RegionKind, count: int, calls: list[int]
) -> None:
    await with_regions(model, count, kind)
    with capture_logs():
        await invalidated(model)
    assert sizes(model) == calls
    assert model.hypervisor.counters().mapped_gfns == 0
    assert {region.mapped_gfns for region in model.regions.first_regions(count)} == {0}


async def test_movable_memory_and_the_rest_go_in_a_call_each(model: ModelPartition) -> None:
    await with_regions(model, MOST // 2, MMIO)
    await with_regions(model, MOST // 2, MOVABLE, gfn=2 * GFN)
    await invalidated(model)
    assert sizes(model) == [MOST // 2, MOST // 2]


@pytest.mark.parametrize("kind", [MMIO, MOVABLE])
async def test_many_invalidations_that_one_pass_serves_are_one_call(
    model: ModelPartition, kind: RegionKind
) -> None:
    await with_scattered(model, MOST, kind)
    for page in range(0, MOST, 2):  # of every other mapping
        batch = model.notifier.invalidate(UaddrRange.at_page(PAGE + 2 * page, 1))
    await batch.done.wait()
    assert sizes(model) == [MOST // 2]
    assert model.hypervisor.counters().mapped_gfns == MOST // 2


async def test_a_remove_is_a_call_for_64_pieces(model: ModelPartition) -> None:
    await with_scattered(model, MOST + 8)
    await model.remove_region(GFN, 2 * (MOST + 8), PAGE)
    assert sizes(model) == [64, 8]


async def test_the_end_of_a_partition_is_a_call_for_64_pieces(model: ModelPartition) -> None:
    await with_regions(model, MOST + 8, MOVABLE)
    await model.regions.close()
    assert sizes(model) == [64, 8]
    assert (model.regions.region_count, model.hypervisor.counters().slat_extents) == (0, 0)


async def test_at_the_end_of_a_partition_the_regions_go_as_many_at_once_as_a_call_takes(
    model: ModelPartition,
) -> None:
    """Those behind a call that is refused are still in the list."""
    model.hypervisor.pieces_per_call = 2
    await with_regions(model, 6)
    model.hypervisor.failing_calls = {len(model.hypervisor.events) + 3}
    with pytest.raises(PartitionLost):
        await model.regions.close()
    assert model.regions.region_count == 2


async def test_a_pinned_add_is_a_call_for_64_pieces(model: ModelPartition) -> None:
    for page in range(MOST + 8):
        await model.map_vma(PAGE + page, 1, PFN + 2 * page)
    await model.add_region(GFN, MOST + 8, PAGE, PINNED)
    assert sizes(model) == [64, 8]
    assert model.regions.first_regions(1)[0].mapped_gfns == MOST + 8


async def test_a_hypervisor_that_takes_one_piece_is_asked_for_each(model: ModelPartition) -> None:
    model.hypervisor.pieces_per_call = 1
    await with_regions(model, 4)
    await with_regions(model, 4, MOVABLE, gfn=2 * GFN)
    await invalidated(model)
    await model.regions.close()
    assert set(sizes(model)) == {1}


# ------------------------------------------------ while a list is out


@pytest.mark.parametrize("piece", [0, 4])
async def test_faults_on_all_pieces_of_a_list_wait_until_it_is_answered(
    model: ModelPartition, nursery: trio.Nursery, piece: int
) -> None:
    """Also on those that the hypervisor has done, and on those that it has not begun with."""
    await with_scattered(model, 3)
    gates = [model.gates.hold(point) for point in (Point.UNMAP, Point.UNMAP)]
    removing = Running(nursery, model.remove_region, GFN, 6, PAGE)
    gates[0].open()
    await gates[1].wait_reached()
    assert isinstance(model.mappings.find(GFN + piece), trio.Event)
    gates[1].open()
    await removing.result()
    assert model.mappings.find(GFN + piece) is None


async def test_a_change_within_another_wakes_its_own_waiters_and_those_look_again(
    model: ModelPartition,
) -> None:
    outer, inner = GfnRange.of(GFN, 8), GfnRange.of(GFN + 2, 1)
    with model.mappings.changing([outer, GfnRange.of(GFN + 100, 1)]):
        with model.mappings.changing([inner]):
            within, beside = model.mappings.find(GFN + 2), model.mappings.find(GFN + 100)
        again = model.mappings.find(GFN + 2)
        assert isinstance(within, trio.Event)
        assert isinstance(beside, trio.Event)
        assert (within.is_set(), beside.is_set()) == (True, False)
        assert again is beside
    assert beside.is_set()
    assert model.mappings.find(GFN + 2) is None


async def test_a_vp_that_is_cancelled_while_a_list_is_out_leaves_the_whole_list_mapped(
    model: ModelPartition, nursery: trio.Nursery
) -> None:
    await with_scattered(model, 3)
    await invalidated(model)
    gate = model.gates.hold(Point.MAP)
    region = model.regions.first_regions(1)[0]
    committing = Running(nursery, committed, model, region, 3)
    await gate.wait_reached()
    nursery.cancel_scope.cancel()
    gate.open()
    with trio.CancelScope(shield=True):
        await committing.result()
    assert (model.pfns(GFN, 3), region.mapped_gfns) == ([PFN, None, PFN + 2], 3)


# ------------------------------------------------ a piece that is refused, or lost


def wanted(count: int) -> list[Mapping]:
    return [
        Mapping(GFN + page, GFN + page + 1, Frame("host", PFN + page), PAGE + page, RW)
        for page in range(0, 2 * count, 2)
    ]


async def committed(model: ModelPartition, region: Region, count: int) -> None:
    async with model.mappings.lock:
        await model.mappings.map_gaps(region, wanted(count), math.inf)


REFUSED = range(1, 7)
LOOKED_AT = range(GFN - 1, GFN + 2 * len(REFUSED) + 1)


@pytest.mark.parametrize("nth", REFUSED)
@pytest.mark.parametrize("kind", [MMIO, MOVABLE])
async def test_a_list_of_maps_that_is_refused_half_way_leaves_all_as_it_was(
    model: ModelPartition, kind: RegionKind, nth: int
) -> None:
    await with_scattered(model, len(REFUSED), kind)
    await invalidated(model)
    before = model.hypervisor.counters()
    model.hypervisor.calls.clear()
    model.hypervisor.refuse_map(nth)
    region = model.regions.first_regions(1)[0]
    with capture_logs(), pytest.raises(HypervisorError, match="refused by order"):
        await committed(model, region, len(REFUSED))
    after = model.hypervisor.counters()
    assert (after.mapped_gfns, after.no_access_gfns) == (before.mapped_gfns, before.no_access_gfns)
    assert (region.mapped_gfns, model.mappings.find(GFN)) == (0, None)
    assert misrecorded(model, LOOKED_AT) is None
    assert sizes(model) == ([nth] if nth == 1 else [nth, nth - 1])


@pytest.mark.parametrize("nth", REFUSED)
async def test_a_refused_list_undoes_only_what_its_own_call_mapped(model: ModelPartition, nth: int) -> None:
    """A list after others, of one commit."""
    model.hypervisor.pieces_per_call = 2
    await with_scattered(model, len(REFUSED))
    await model.invalidate(PAGE + 2, 2 * len(REFUSED))
    region = model.regions.first_regions(1)[0]
    model.hypervisor.refuse_map(nth)
    if nth == len(REFUSED):
        await committed(model, region, len(REFUSED))
        return
    with capture_logs(), pytest.raises(HypervisorError, match="refused by order"):
        await committed(model, region, len(REFUSED))
    assert (model.pfns(GFN, 3), region.mapped_gfns) == ([PFN, None, None], 1)
    assert misrecorded(model, LOOKED_AT) is None


async def served(model: ModelPartition) -> None:
    model.notifier.invalidate(UaddrRange.at_page(PAGE, 1 << 20))
    await model.regions.serve_pending()


async def removed(model: ModelPartition) -> None:
    await model.regions.remove(model.regions.first_regions(1)[0])


async def closed(model: ModelPartition) -> None:
    await model.regions.close()


@pytest.mark.parametrize("nth", REFUSED)
@pytest.mark.parametrize("end", [served, removed, closed])
async def test_a_list_of_unmaps_that_is_refused_loses_the_partition_and_records_what_is_left(
    end: Callable[[ModelPartition], Awaitable[None]], nth: int
) -> None:
    model = ModelPartition()
    model.hypervisor.pieces_per_call = MOST
    await with_scattered(model, len(REFUSED))
    region = model.regions.first_regions(1)[0]
    model.hypervisor.failing_calls = {len(model.hypervisor.events) + nth}
    named = rf"gfns \[{GFN + 2 * nth - 2:#x}, {GFN + 2 * nth - 1:#x}\)" + (
        f" and {len(REFUSED) - nth} more" if nth < len(REFUSED) else ""
    )
    with pytest.raises(PartitionLost, match=f"^{named} may still be reached by the guest: "):
        await end(model)
    left = [gfn for gfn in LOOKED_AT if model.pfn(gfn) is not None]
    assert left == list(range(GFN + 2 * nth - 2, GFN + 2 * len(REFUSED), 2))
    assert [mapping.start for mapping in model.mappings.some(region.gfns, MOST)] == left
    assert region.mapped_gfns == len(left)


@pytest.mark.parametrize("nth", REFUSED)
async def test_a_list_of_no_access_that_is_refused_loses_the_partition_and_records_what_is_left(
    nth: int,
) -> None:
    model = ModelPartition()
    model.hypervisor.pieces_per_call = MOST
    await with_scattered(model, len(REFUSED), MOVABLE)
    model.hypervisor.refuse_map(nth)
    with pytest.raises(PartitionLost, match="may still be reached by the guest: refused by order"):
        await served(model)
    region = model.regions.first_regions(1)[0]
    assert region.mapped_gfns == len(REFUSED) - nth + 1
    assert misrecorded(model, LOOKED_AT) is None


async def test_a_list_of_unmaps_that_breaks_down_loses_the_partition_and_forgets_nothing(
    model: ModelPartition, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def broken(_: object) -> None:
        raise RuntimeError("a mistake")

    await with_scattered(model, 3)
    monkeypatch.setattr(model.hypervisor, "unmap_gpas", broken)
    with pytest.raises(PartitionLost, match="and 2 more may still be reached by the guest: a mistake"):
        await served(model)
    assert model.regions.first_regions(1)[0].mapped_gfns == 3


# ------------------------------------------------ the record


async def test_neighbours_of_one_list_that_continue_each_other_become_one_mapping(
    model: ModelPartition,
) -> None:
    """Memory whose rights alternate, and grow: each page is a gap of its own."""
    region = Region(GfnRange.of(GFN, 7), UaddrRange.at_page(PAGE, 7), MMIO, KindOrigin.STATED, RW)
    whole = Mapping(GFN, GFN + 7, Frame("host", PFN), PAGE, RW)
    held = [
        replace(whole.slice(gfn, gfn + 1), access=Access.READ if gfn % 2 else Access.NONE | Access.WRITE)
        for gfn in range(GFN, GFN + 7)
    ]
    async with model.mappings.lock:
        await model.mappings.map_gaps(region, held, math.inf)
        await model.mappings.map_gaps(region, [whole], math.inf)
    assert sizes(model) == [7, 7, 7], "mapped, taken away, and mapped with more rights"
    assert model.mappings.some(region.gfns, 8) == [whole]


async def test_one_mapping_of_a_list_that_gets_more_rights_is_taken_away_before(
    model: ModelPartition,
) -> None:
    region = Region(GfnRange.of(GFN, 3), UaddrRange.at_page(PAGE, 3), MMIO, KindOrigin.STATED, RW)
    whole = Mapping(GFN, GFN + 3, Frame("host", PFN), PAGE, RW)
    held = replace(whole.slice(GFN + 1, GFN + 2), access=Access.READ)
    async with model.mappings.lock:
        await model.mappings.map_gaps(region, [held], math.inf)
        await model.mappings.map_gaps(region, [whole], math.inf)
    assert sizes(model) == [1, 1, 3]
    assert (model.mappings.some(region.gfns, 4), region.mapped_gfns) == ([whole], 3)


async def test_once_others_have_run_what_does_not_hold_any_more_is_not_mapped(model: ModelPartition) -> None:
    """At a limit pieces are mapped one by one, and a removal may be read between two: what the image has is
    not what belongs there any more."""
    mappings = GuestMappings(
        model.hypervisor, lambda: 2, Quota(0, "mappings", "mappings_per_uid", lambda: 1 << 20)
    )
    region = Region(GfnRange.of(GFN, 16), UaddrRange.at_page(PAGE, 16), MMIO, KindOrigin.STATED, RW)
    asked = list[int]()

    def goes_on() -> bool:
        asked.append(len(model.hypervisor.calls))
        return False

    async with mappings.lock:
        assert await mappings.map_gaps(region, wanted(3), math.inf, goes_on) == 1
    assert asked == [1]
    assert mappings.mapping_count == 1


async def test_at_a_limit_of_mappings_no_gfn_goes_twice_in_a_list(model: ModelPartition) -> None:
    """The first cuts the mapping, the second has to take all of it."""
    mappings = GuestMappings(
        model.hypervisor, lambda: 2, Quota(0, "mappings", "mappings_per_uid", lambda: 1 << 20)
    )
    region = Region(GfnRange.of(GFN, 16), UaddrRange.at_page(PAGE, 16), MMIO, KindOrigin.STATED, RW)
    async with mappings.lock:
        await mappings.map_gaps(region, [Mapping(GFN, GFN + 16, Frame("host", PFN), PAGE, RW)], math.inf)
        going = mappings.revocation()
        for page in (2, 6, 10):
            await going.revoke(region, GfnRange.of(GFN + page, 1))
        await going.finish()
    asked = [(piece.start, piece.end) for call in model.hypervisor.calls[1:] for piece in call]
    assert asked == [(GFN + 2, GFN + 3), (GFN + 3, GFN + 16)]
    assert region.mapped_gfns == 2


async def test_what_goes_too_much_at_a_limit_does_not_go_again_when_there_is_room(
    model: ModelPartition,
) -> None:
    """All of a movable mapping has to go; then a full list of other pieces goes, and leaves room."""
    model.hypervisor.pieces_per_call = 2
    mappings = GuestMappings(
        model.hypervisor, lambda: 3, Quota(0, "mappings", "mappings_per_uid", lambda: 1 << 20)
    )
    cut, first, second = (
        Region(GfnRange.of(gfn, 8), UaddrRange.at_page(gfn, 8), kind, KindOrigin.STATED, RW)
        for gfn, kind in ((GFN, MOVABLE), (GFN + 16, MMIO), (GFN + 32, MMIO))
    )
    async with mappings.lock:
        for region in (cut, first, second):
            start, end = region.gfns.start, region.gfns.end
            await mappings.map_gaps(region, [Mapping(start, end, Frame("host", start), start, RW)], math.inf)
        model.hypervisor.calls.clear()
        going = mappings.revocation()
        for region, gfns in (
            (cut, GfnRange.of(GFN + 2, 1)),
            (first, first.gfns),
            (second, second.gfns),
            (cut, GfnRange.of(GFN + 6, 1)),
        ):
            await going.revoke(region, gfns)
        await going.finish()
    asked = [(piece.start, piece.end) for call in model.hypervisor.calls for piece in call]
    assert sorted(asked) == [(each.gfns.start, each.gfns.end) for each in (cut, first, second)]


@pytest.mark.parametrize("gaps", [2, 3])
async def test_near_a_limit_what_is_joined_with_its_neighbours_needs_no_room(
    model: ModelPartition, gaps: int
) -> None:
    """Gaps in one mapping: each that is filled makes one mapping of three."""
    mappings = GuestMappings(
        model.hypervisor, lambda: gaps + 2, Quota(0, "mappings", "mappings_per_uid", lambda: 1 << 20)
    )
    pages = 2 * gaps + 1
    region = Region(GfnRange.of(GFN, pages), UaddrRange.at_page(PAGE, pages), MMIO, KindOrigin.STATED, RW)
    async with mappings.lock:
        await mappings.map_gaps(region, wanted(gaps + 1), math.inf)
        whole = Mapping(GFN, GFN + pages, Frame("host", PFN), PAGE, RW)
        assert await mappings.map_gaps(region, [whole], math.inf) == gaps
        assert mappings.some(region.gfns, 8) == [whole]


@pytest.mark.parametrize(
    ("limit", "limit_of_uid", "refusal"),
    [(5, 1 << 20, "a partition may have 5 mappings"), (6, 5, "uid 0 may have 5 mappings")],
)
async def test_there_is_room_for_all_that_is_wanted_or_nothing_is_mapped(
    model: ModelPartition, limit: int, limit_of_uid: int, refusal: str
) -> None:
    mappings = GuestMappings(
        model.hypervisor, lambda: limit, Quota(0, "mappings", "mappings_per_uid", lambda: limit_of_uid)
    )
    region = Region(GfnRange.of(GFN, 16), UaddrRange.at_page(PAGE, 16), MMIO, KindOrigin.STATED, RW)
    async with mappings.lock:
        with capture_logs(), pytest.raises(HypervisorError, match=refusal):
            await mappings.map_gaps(region, wanted(6), math.inf)
        assert (model.hypervisor.counters().mapped_gfns, region.mapped_gfns) == (0, 0)
        assert await mappings.map_gaps(region, wanted(5), math.inf) == 5
