"""The region manager by its own interface: look-ups, what a refusal leaves, what operators see."""

from __future__ import annotations

import errno
import math
from collections.abc import Awaitable, Callable

import pytest
import trio
from structlog.testing import capture_logs
from trio.testing import wait_all_tasks_blocked

from explorer.model_partition import touch
from explorer.pauses import Point
from explorer.ports import Mapped, Unmapped
from fakes.model_partition import RW, TIMEOUT, ModelPartition
from fakes.one_region import GFN, PAGE, PAGES, PFN, with_region
from fakes.running import Running
from fakes.used_up_time import time_used_up_every
from intercept_protocol.addresses import GfnRange, UaddrRange
from intercept_protocol.errors import WireError
from intercept_protocol.messages import MmioGranularity, RegionKind
from intercept_protocol.outcomes import Access, Answer
from interceptd.errors import PartitionLost
from interceptd.hypervisor import HypervisorError
from interceptd.memory.attempt import Attempt
from interceptd.memory.fault_handler import FaultHandler
from interceptd.memory.guest_mappings import GuestMappings
from interceptd.memory.region import KindOrigin, Region, RegionState
from interceptd.memory.region_manager import RegionManager
from interceptd.pages.mapping import Frame, Mapping
from interceptd.quota import Quota
from interceptd.telemetry.event_bus import EventBus

NOTHING = [None] * PAGES


async def mapped(model: ModelPartition) -> Mapping:
    """What serves the first gfn once it was touched."""
    await model.fault(GFN)
    held = model.regions.lookup(GFN, Access.READ)
    assert isinstance(held, Mapping)
    return held


def region_of(kind: RegionKind, state: RegionState = RegionState.LIVE) -> Region:
    return Region(
        GfnRange.of(GFN, PAGES), UaddrRange.at_page(PAGE, PAGES), kind, KindOrigin.STATED, RW, state
    )


def limited(model: ModelPartition, *, mappings: int = 8, regions: int = 8, of_uid: int = 8) -> RegionManager:
    """A manager of its own on the model's ports, whose uid may have so many regions and `of_uid` mappings."""
    quota = Quota(0, "mappings", "mappings_per_uid", lambda: of_uid)
    return RegionManager(
        mappings=GuestMappings(model.hypervisor, lambda: mappings, quota),
        notifier=model.notifier,
        region_limit=lambda: 8,
        quota=Quota(0, "regions", "regions_per_uid", lambda: regions),
        mmio_granularity=MmioGranularity.VMA,
        event_bus=EventBus(),
    )


async def test_mappings_of_the_guest_are_listed_in_order_in_chunks(model: ModelPartition) -> None:
    given = GuestMappings(model.hypervisor, lambda: 8, model.tenant.mappings)
    wanted = [Mapping(at, at + 2, Frame("file", at), PAGE + at, RW) for at in (0, 4, 8, 12)]
    async with given.lock:
        await given.map_gaps(region_of(RegionKind.MMIO), wanted, math.inf)
    assert given.some(GfnRange(start=0, end=100), 2) == wanted[:2]
    assert given.some(GfnRange(start=1, end=13), 8) == [
        wanted[0].slice(1, 2), *wanted[1:3], wanted[3].slice(12, 13),
    ]  # fmt: skip
    assert given.some(GfnRange(start=14, end=100), 8) == []


# ------------------------------------------------ the lock


CHANGES: list[Callable[[ModelPartition, Region], Awaitable[object]]] = [
    lambda model, region: model.mappings.map_gaps(region, [], math.inf),
    lambda model, region: model.mappings.map_no_access([(region, region.gfns)]),
    lambda model, region: model.mappings.revocation().revoke(region, region.gfns),
    lambda model, region: model.mappings.revocation().unmap_all(region, region.gfns),
    lambda model, region: model.regions._invalidate(
        region, region.uaddrs, model.mappings.revocation(), exact=True
    ),
    lambda model, region: model.regions._remove([region]),
]


@pytest.mark.parametrize("change", CHANGES)
async def test_a_change_by_a_task_that_does_not_hold_the_lock_is_refused_and_changes_nothing(
    model: ModelPartition,
    nursery: trio.Nursery,
    change: Callable[[ModelPartition, Region], Awaitable[object]],
) -> None:
    """Neither with the lock free nor while another task holds it."""
    await with_region(model, RegionKind.PINNED)
    region = model.regions.first_regions(1)[0]
    before = list(model.hypervisor.events)
    with pytest.raises(AssertionError):
        await change(model, region)

    async def hold() -> None:
        async with model.mappings.lock:
            await trio.sleep_forever()

    nursery.start_soon(hold)
    await wait_all_tasks_blocked()
    with pytest.raises(AssertionError):
        await change(model, region)
    assert (model.hypervisor.events, model.regions.region_count, region.state) == (
        before,
        1,
        RegionState.LIVE,
    )


# ------------------------------------------------ looking


async def test_a_write_that_the_region_forbids_is_answered_without_resolving(
    model: ModelPartition,
) -> None:
    await model.add_region(GFN, PAGES, PAGE, access=Access.READ)
    assert await model.fault(GFN, Access.WRITE) is Answer.PERMISSION
    assert model.address_space.resolved == []


@pytest.mark.parametrize("touched", [True, False])
async def test_a_fault_on_an_invalidation_that_is_never_served_is_answered(*, touched: bool) -> None:
    """The guest may still have it, but not for long; what is mapped now the pass to come would take again."""
    model = ModelPartition()  # its manager does not run
    await with_region(model)
    for gfn in [GFN] * touched:
        await model.fault(gfn)
    model.notifier.invalidate(UaddrRange.at_page(PAGE, PAGES))
    assert await model.fault(GFN) is Answer.INVALIDATING


async def test_the_first_regions_come_in_order_with_their_mapped_pages(model: ModelPartition) -> None:
    await with_region(model)
    await model.add_region(GFN + PAGES, PAGES, PAGE)
    await model.add_region(GFN - 1, 1, PAGE - 1)
    await model.fault(GFN)
    await model.invalidate(PAGE, 2)
    assert [(region.gfns.start, region.mapped_gfns) for region in model.regions.first_regions(2)] == [
        (GFN - 1, 0),
        (GFN, PAGES - 2),
    ]


# ------------------------------------------------ the lock


async def test_the_manager_is_busy_while_the_hypervisor_is_asked(
    model: ModelPartition, nursery: trio.Nursery
) -> None:
    await with_region(model)
    gate = model.gates.hold(Point.MAP)
    fault = Running(nursery, model.fault, GFN)
    await gate.wait_reached()
    busy = model.regions.busy
    gate.open()
    await fault.result()
    assert (busy, model.regions.busy) == (True, False)


@pytest.mark.parametrize("second", ["remove", "remove exactly", "close", "add", "serve"])
async def test_changes_are_serialised(model: ModelPartition, nursery: trio.Nursery, second: str) -> None:
    """One slot says what is being changed: two changes at once would forget each other."""
    await with_region(model)
    region = model.regions.first_regions(1)[0]
    gate = model.gates.hold(Point.MAP)
    fault = Running(nursery, model.fault, GFN)
    await gate.wait_reached()
    changes = {
        "remove": lambda: model.regions.remove(region),
        "remove exactly": lambda: model.regions.remove_exactly(region.gfns, region.uaddrs),
        "close": model.regions.close,
        "add": lambda: model.add_region(GFN + PAGES, 1, PAGE, RegionKind.MOVABLE),
        "serve": lambda: model.invalidate(PAGE, PAGES),
    }
    change = Running(nursery, changes[second])
    await wait_all_tasks_blocked()
    assert (change.done, model.regions.region_count) == (False, 1)
    assert model.hypervisor.events == [Mapped(GFN, GFN + PAGES, PFN, RW)]
    gate.open()
    await change.result()
    assert await fault.result() in {Answer.MAPPED, Answer.NO_REGION}


async def test_i10_a_mapping_is_recorded_before_the_hypervisor_is_asked(
    model: ModelPartition, nursery: trio.Nursery
) -> None:
    await with_region(model)
    gate = model.gates.hold(Point.MAP)
    fault = Running(nursery, model.fault, GFN)
    await gate.wait_reached()
    recorded = model.regions.first_regions(1)[0].mapped_gfns
    gate.open()
    await fault.result()
    assert recorded == PAGES


async def test_a_fault_during_a_roll_back_waits(model: ModelPartition, nursery: trio.Nursery) -> None:
    """Told that it has the page, it would be back at once."""
    await with_region(model)
    await model.fault(GFN)
    await model.invalidate(PAGE, 4)
    await model.invalidate(PAGE + 8, 4)
    model.hypervisor.refuse_map(nth=2)
    undoing = model.gates.hold(Point.UNMAP)
    refused = Running(nursery, model.fault, GFN)
    await undoing.wait_reached()
    fault = Running(nursery, model.fault, GFN)
    await wait_all_tasks_blocked()
    waited = not fault.done
    undoing.open()
    assert (waited, await refused.result(), await fault.result()) == (
        True,
        Answer.HYPERVISOR_ERROR,
        Answer.MAPPED,
    )


async def test_a_fault_during_a_refused_add_finds_no_region(
    model: ModelPartition, nursery: trio.Nursery
) -> None:
    """If it resolved, it would map what would never be revoked."""
    await model.map_vma(PAGE, PAGES, PFN)
    model.hypervisor.refuse_map(number=errno.ENOMEM)
    gate = model.gates.hold(Point.MAP)
    add = Running(nursery, model.add_region, GFN, PAGES, PAGE, RegionKind.MOVABLE)
    await gate.wait_reached()
    fault = Running(nursery, model.fault, GFN)
    await wait_all_tasks_blocked()
    gate.open()
    with pytest.raises(WireError):
        await add.result()
    assert await fault.result() is Answer.NO_REGION
    assert model.pfns(GFN, PAGES) == NOTHING


# ------------------------------------------------ refusals


async def test_a_refused_map_is_logged_with_its_region_and_why(model: ModelPartition) -> None:
    await with_region(model)
    model.hypervisor.refuse_map()
    with capture_logs() as logs:
        await model.fault(GFN)
    assert logs == [
        {
            "event": "map_refused",
            "log_level": "warning",
            "region": "[0x100, 0x110)",
            "error": "refused by order",
        }
    ]


async def test_a_hit_pinned_region_is_logged_once_with_the_range(model: ModelPartition) -> None:
    await with_region(model, RegionKind.PINNED)
    with capture_logs() as logs:
        await model.invalidate(PAGE + 2, 1)
        await model.invalidate(PAGE + 3, 1)
    assert logs == [
        {
            "event": "pinned_region_dangling",
            "log_level": "warning",
            "start_gfn": GFN,
            "page_count": PAGES,
            "invalidated": "[0x102, 0x103)",
        }
    ]


async def test_an_unmap_that_is_refused_loses_the_partition_and_says_which_gfns(
    model: ModelPartition,
) -> None:
    await with_region(model)
    await model.fault(GFN)
    model.hypervisor.refuse_unmaps()
    with pytest.raises(PartitionLost, match=r"gfns \[0x100, 0x110\) may still be reached"):
        await model.remove_region(GFN, PAGES, PAGE)


async def test_a_map_beyond_the_limit_of_mappings_is_refused_and_removes_none(
    model: ModelPartition,
) -> None:
    regions = limited(model, mappings=2)
    await model.map_vma(PAGE, 1, PFN)
    await model.map_vma(PAGE + 2, 1, PFN + 2)
    await model.map_vma(PAGE + 4, 1, PFN + 4)
    model.hypervisor.events.clear()
    path = FaultHandler(regions, model.address_space, TIMEOUT)
    await regions.add(region_of(RegionKind.MMIO))
    answers = [await touch(path, GFN + page, Access.READ) for page in (0, 2, 4, 0)]
    assert answers == [Answer.MAPPED, Answer.MAPPED, Answer.HYPERVISOR_ERROR, Answer.ALREADY_MAPPED]
    assert model.hypervisor.counters().mapped_gfns == 2


async def test_pages_that_come_one_by_one_and_continue_each_other_are_one_mapping(
    model: ModelPartition,
) -> None:
    regions = limited(model, mappings=2)
    regions.mmio_granularity = MmioGranularity.PAGE
    await model.map_vma(PAGE, PAGES, PFN)
    await regions.add(region_of(RegionKind.MMIO))
    path = FaultHandler(regions, model.address_space, TIMEOUT)
    answers = [await touch(path, GFN + page, Access.READ) for page in range(PAGES)]
    assert answers == [Answer.MAPPED] * PAGES


async def test_i9_an_attempt_whose_pages_another_has_mapped_commits_as_already_mapped(
    model: ModelPartition,
) -> None:
    await model.map_vma(PAGE, PAGES, PFN)
    await model.add_region(GFN, PAGES, PAGE)
    extent = await model.declared.resolve(
        PAGE, UaddrRange.at_page(PAGE, PAGES), UaddrRange.at_page(PAGE, PAGES)
    )
    assert extent is not None
    region = model.regions.first_regions(1)[0]
    attempts = [model.regions.begin(region, GFN, Access.READ) for _ in range(2)]
    answers = [
        await model.regions.commit(attempt, [extent]) for attempt in attempts if isinstance(attempt, Attempt)
    ]
    assert answers == [Answer.MAPPED, Answer.ALREADY_MAPPED]


async def test_a_region_beyond_its_uids_limit_is_not_added(model: ModelPartition) -> None:
    regions = limited(model, mappings=2, regions=0)
    with pytest.raises(WireError, match="uid 0 may have 0 regions") as refused:
        await regions.add(region_of(RegionKind.MMIO))
    assert (refused.value.number, refused.value.details) == (errno.ENOSPC, {"limit": "regions_per_uid"})
    assert regions.lookup(GFN, Access.READ) is Answer.NO_REGION


async def test_the_refusal_beyond_the_limit_of_mappings_names_it(model: ModelPartition) -> None:
    regions = limited(model, mappings=0)
    await model.map_vma(PAGE, 1, PFN)
    await regions.add(region_of(RegionKind.MMIO))
    with capture_logs() as logs:
        await touch(FaultHandler(regions, model.address_space, TIMEOUT), GFN, Access.READ)
    assert [entry["error"] for entry in logs] == ["a partition may have 0 mappings"]


async def test_the_refusal_beyond_the_limit_of_the_uids_mappings_names_it(model: ModelPartition) -> None:
    regions = limited(model, of_uid=0)
    await model.map_vma(PAGE, 1, PFN)
    await regions.add(region_of(RegionKind.MMIO))
    with capture_logs() as logs:
        answer = await touch(FaultHandler(regions, model.address_space, TIMEOUT), GFN, Access.READ)
    assert answer is Answer.HYPERVISOR_ERROR
    assert [entry["error"] for entry in logs] == ["uid 0 may have 0 mappings"]


# ------------------------------------------------ invalidations at a limit of mappings


async def invalidate(model: ModelPartition, regions: RegionManager, page: int, pages: int = 1) -> None:
    model.notifier.invalidate(UaddrRange.at_page(page, pages))
    await regions.serve_pending()


@pytest.mark.parametrize("kind", [RegionKind.MMIO, RegionKind.MOVABLE])
@pytest.mark.parametrize("limits", [{"mappings": 2}, {"of_uid": 2}])
async def test_invalidations_cut_a_mapping_in_pieces_up_to_a_limit_and_then_take_all_of_one(
    model: ModelPartition, kind: RegionKind, limits: dict[str, int]
) -> None:
    regions = limited(model, **limits)
    await model.map_vma(PAGE, PAGES, PFN)
    await regions.add(region_of(kind))
    await touch(FaultHandler(regions, model.address_space, TIMEOUT), GFN, Access.READ)
    await invalidate(model, regions, PAGE + 4)
    assert regions.first_regions(1)[0].mapped_gfns == PAGES - 1
    await invalidate(model, regions, PAGE + 8)
    assert (regions.first_regions(1)[0].mapped_gfns, model.pfns(GFN, 6)) == (
        4,
        [PFN, PFN + 1, PFN + 2, PFN + 3, None, None],
    )


async def test_a_refused_map_at_a_limit_undoes_only_its_own_pages(model: ModelPartition) -> None:
    """They lie in the middle of what was joined with them."""
    limits = iter([8, 8, 8])
    given = GuestMappings(model.hypervisor, lambda: next(limits, 0), model.tenant.mappings)
    region = region_of(RegionKind.MMIO)
    whole = Mapping(GFN, GFN + PAGES, Frame("file", 0), PAGE, RW)
    before = [whole.slice(GFN, GFN + 1), whole.slice(GFN + 2, GFN + 3)]
    async with given.lock:
        await given.map_gaps(region, before, math.inf)
        with pytest.raises(HypervisorError):
            await given.map_gaps(region, [whole], math.inf)
    assert given.some(region.gfns, 8) == before


@pytest.mark.parametrize(("page", "pages", "left"), [(0, 4, 12), (12, 4, 12), (0, 16, 0)])
async def test_an_invalidation_that_cuts_no_mapping_in_two_takes_only_its_pages_at_a_limit(
    model: ModelPartition, page: int, pages: int, left: int
) -> None:
    regions = limited(model, mappings=1)
    await model.map_vma(PAGE, PAGES, PFN)
    await regions.add(region_of(RegionKind.MMIO))
    await touch(FaultHandler(regions, model.address_space, TIMEOUT), GFN, Access.READ)
    await invalidate(model, regions, PAGE + page, pages)
    assert regions.first_regions(1)[0].mapped_gfns == left


async def test_at_a_limit_an_invalidation_may_begin_where_nothing_is_mapped(model: ModelPartition) -> None:
    regions = limited(model, mappings=1)
    await model.map_vma(PAGE, PAGES, PFN)
    await regions.add(region_of(RegionKind.MMIO))
    await touch(FaultHandler(regions, model.address_space, TIMEOUT), GFN, Access.READ)
    for pages in (4, 6):
        await invalidate(model, regions, PAGE, pages)
    assert regions.first_regions(1)[0].mapped_gfns == PAGES - 6


async def test_a_map_that_breaks_down_loses_the_partition(
    model: ModelPartition, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Our own mistake, not a refusal: who knows what the guest reaches now."""

    async def break_down(_: object) -> None:
        raise ZeroDivisionError

    await with_region(model)
    monkeypatch.setattr(model.hypervisor, "map_gpas", break_down)
    with (
        capture_logs() as logs,
        pytest.raises(PartitionLost, match=r"mapping gfns \[0x100, 0x110\) broke down: ZeroDivisionError$"),
    ):
        await model.fault(GFN)
    assert [(entry["event"], entry["exc_info"]) for entry in logs] == [("map_broke_down", True)]


async def test_a_map_that_loses_the_partition_reports_its_own_reason(
    model: ModelPartition, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A late map that could not be undone: no Python repr around the sentence."""

    async def lose(_: object) -> None:
        raise PartitionLost("it could not be undone")

    await with_region(model)
    monkeypatch.setattr(model.hypervisor, "map_gpas", lose)
    with capture_logs() as logs, pytest.raises(PartitionLost, match=r"^it could not be undone$"):
        await model.fault(GFN)
    assert logs == []


# ------------------------------------------------ taking away


async def test_neighbouring_mappings_go_in_one_call(model: ModelPartition) -> None:
    await model.map_vma(PAGE, 4, PFN)
    await model.map_vma(PAGE + 4, 4, 0xB000)
    await model.map_vma(PAGE + 12, 4, 0xC000)
    await model.add_region(GFN, PAGES, PAGE)
    for gfn in (GFN, GFN + 4, GFN + 12):
        await model.fault(gfn)
    model.hypervisor.events.clear()
    await model.invalidate(PAGE, PAGES)
    assert model.hypervisor.events == [Unmapped(GFN, GFN + 8), Unmapped(GFN + 12, GFN + 16)]


async def test_removing_a_region_unmaps_only_its_mapped_pages(model: ModelPartition) -> None:
    await model.map_vma(PAGE + 4, 4, PFN)
    await model.add_region(GFN, PAGES, PAGE)
    await model.fault(GFN + 4)
    model.hypervisor.events.clear()
    await model.remove_region(GFN, PAGES, PAGE)
    assert model.hypervisor.events == [Unmapped(GFN + 4, GFN + 8)]


async def test_removing_a_movable_region_takes_its_no_access_entries_too(model: ModelPartition) -> None:
    await with_region(model, RegionKind.MOVABLE)
    await model.remove_region(GFN, PAGES, PAGE)
    assert model.hypervisor.counters().slat_extents == 0


async def test_closing_leaves_no_region_and_an_empty_slat(model: ModelPartition) -> None:
    await with_region(model, RegionKind.MOVABLE)
    await model.add_region(GFN + PAGES, PAGES, PAGE, RegionKind.MMIO)
    await model.fault(GFN)
    await model.fault(GFN + PAGES)
    await model.regions.close()
    assert (model.regions.region_count, model.hypervisor.counters().slat_extents) == (0, 0)


async def test_a_close_that_has_begun_completes_despite_cancellation(
    model: ModelPartition, nursery: trio.Nursery
) -> None:
    """It takes turns with others, and each turn is a chance to be cut off."""
    await with_region(model)
    await model.fault(GFN)
    for gfn in range(2):
        await model.add_region(1000 + gfn, 1, PAGE)
    unmapping = model.gates.hold(Point.UNMAP)
    with time_used_up_every(1):
        close = Running(nursery, model.regions.close)
        await unmapping.wait_reached()
        nursery.start_soon(close.cancel)
        await wait_all_tasks_blocked()
        unmapping.open()
        await wait_all_tasks_blocked()
    assert (model.regions.region_count, model.hypervisor.counters().slat_extents) == (0, 0)


# ------------------------------------------------ begin_whole


@pytest.fixture
async def unserved() -> ModelPartition:
    """With a pinned region, and no manager: what is pending stays so."""
    model = ModelPartition()
    await with_region(model, RegionKind.PINNED)
    return model


@pytest.mark.parametrize("page", [PAGE, PAGE + PAGES - 1])
async def test_a_pinned_add_does_not_start_over_a_pending_invalidation(
    unserved: ModelPartition, page: int
) -> None:
    """The next pass would revoke what was just reported as mapped."""
    region = unserved.regions.first_regions(1)[0]
    unserved.notifier.invalidate(UaddrRange.at_page(page, 1))
    with pytest.raises(WireError, match="is being invalidated") as refused:
        unserved.regions.begin_whole(region)
    assert refused.value.number == errno.EFAULT


@pytest.mark.parametrize("page", [PAGE - 1, PAGE + PAGES])
async def test_a_pinned_add_starts_beside_a_pending_invalidation(unserved: ModelPartition, page: int) -> None:
    region = unserved.regions.first_regions(1)[0]
    unserved.notifier.invalidate(UaddrRange.at_page(page, 1))
    attempt = unserved.regions.begin_whole(region)
    assert (attempt.window.uaddrs, attempt.uaddr_page, attempt.stale) == (region.uaddrs, PAGE, False)


async def test_a_pinned_add_does_not_start_over_memory_being_revoked(
    model: ModelPartition, nursery: trio.Nursery
) -> None:
    await with_region(model, RegionKind.PINNED)
    region = model.regions.first_regions(1)[0]
    gate = model.gates.hold(Point.UNMAP)
    invalidate = Running(nursery, model.invalidate, PAGE + 3, 1)
    await gate.wait_reached()
    with pytest.raises(WireError, match="is being invalidated"):
        model.regions.begin_whole(region)
    gate.open()
    await invalidate.result()


async def test_only_the_exact_region_is_removed(model: ModelPartition) -> None:
    await with_region(model)
    await model.add_region(GFN + PAGES, PAGES, PAGE)
    await model.regions.remove_exactly(GfnRange.of(GFN, PAGES), UaddrRange.at_page(PAGE, PAGES))
    assert [region.gfns.start for region in model.regions.first_regions(9)] == [GFN + PAGES]
