"""The facts that the core emits on the event bus: each once, when it becomes true, with range and source."""

from __future__ import annotations

import pytest

from explorer.model_partition import addition, removal
from fakes.model_partition import RW, ModelPartition
from fakes.one_region import GFN, PAGE, PAGES, PFN
from intercept_protocol.addresses import UaddrRange
from intercept_protocol.errors import WireError
from intercept_protocol.events import (
    AnyFact,
    InvalidationBegun,
    InvalidationEnded,
    PinnedRegionDangling,
    RangeInvalidated,
    RegionAdded,
    RegionRemoved,
)
from intercept_protocol.messages import RegionKind
from intercept_protocol.outcomes import Access
from interceptd.telemetry.event_bus import EVENTS_KEPT, EventFilter, Subscription

START_UADDR = PAGE << 12


def listening(model: ModelPartition, *events: str) -> Subscription:
    subscription = Subscription()
    model.event_bus.subscribe(subscription, EventFilter(frozenset(events)))
    return subscription


def heard(subscription: Subscription) -> list[AnyFact]:
    return [event.fact for event in subscription.take(EVENTS_KEPT)]


@pytest.mark.parametrize(
    ("access", "writable", "executable"),
    [
        (Access.READ, False, False),
        (RW, True, False),
        (Access.READ | Access.EXECUTE, False, True),
        (RW | Access.EXECUTE, True, True),
    ],
)
async def test_region_events_have_the_rights_on_add_and_remove(
    model: ModelPartition, access: Access, writable: bool, executable: bool
) -> None:
    told = listening(model, "region_added", "region_removed")
    await model.add_region(GFN, PAGES, PAGE, RegionKind.MMIO, access)
    added = heard(told)
    await model.remove_region(GFN, PAGES, PAGE)
    assert added == [
        RegionAdded(
            start_gfn=GFN,
            page_count=PAGES,
            start_uaddr=START_UADDR,
            kind="mmio",
            writable=writable,
            executable=executable,
        )
    ]
    assert heard(told) == [RegionRemoved(start_gfn=GFN, page_count=PAGES, start_uaddr=START_UADDR)]


async def test_a_region_refused_by_the_hypervisor_sends_no_event(model: ModelPartition) -> None:
    told = listening(model, "region_added", "region_removed")
    model.hypervisor.refuse_map()
    with pytest.raises(WireError):
        await model.add_region(GFN, PAGES, PAGE, RegionKind.MOVABLE)
    assert heard(told) == []


async def test_a_change_tells_of_what_went_and_then_of_what_came(model: ModelPartition) -> None:
    await model.add_region(GFN, PAGES, PAGE)
    told = listening(model, "region_added", "region_removed")
    await model.change_regions([removal(GFN, PAGES, PAGE)], [addition(GFN + 1, 2, PAGE, access=Access.READ)])
    assert heard(told) == [
        RegionRemoved(start_gfn=GFN, page_count=PAGES, start_uaddr=START_UADDR),
        RegionAdded(
            start_gfn=GFN + 1,
            page_count=2,
            start_uaddr=START_UADDR,
            kind="mmio",
            writable=False,
            executable=False,
        ),
    ]


async def test_a_change_that_is_refused_sends_no_event(model: ModelPartition) -> None:
    await model.add_region(GFN, PAGES, PAGE)
    told = listening(model, "region_added", "region_removed")
    model.hypervisor.refuse_map()
    with pytest.raises(WireError):
        await model.change_regions(
            [removal(GFN, PAGES, PAGE)], [addition(GFN, PAGES, PAGE, RegionKind.MOVABLE)]
        )
    assert heard(told) == []


async def test_a_dangling_pinned_region_sends_one_event(model: ModelPartition) -> None:
    await model.map_vma(PAGE, PAGES, PFN)
    await model.add_region(GFN, PAGES, PAGE, RegionKind.PINNED)
    told = listening(model, "pinned_region_dangling")
    await model.invalidate(PAGE + 2, 1)
    await model.invalidate(PAGE + 3, 1)
    assert heard(told) == [PinnedRegionDangling(start_gfn=GFN, page_count=PAGES, start_uaddr=START_UADDR)]


async def test_an_invalidation_event_has_source_and_range(
    model: ModelPartition,
) -> None:
    told = listening(model, "invalidation_begun", "invalidation_ended", "range_invalidated")
    model.notifier.begin(UaddrRange.at_page(PAGE, 2))
    begun = heard(told)
    model.notifier.end(UaddrRange.at_page(PAGE, 2))
    ended = heard(told)
    model.notifier.invalidate(UaddrRange.at_page(PAGE, 3))
    assert begun == [InvalidationBegun(source="notifier", start_uaddr=START_UADDR, page_count=2)]
    assert ended == [InvalidationEnded(source="notifier", start_uaddr=START_UADDR, page_count=2)]
    assert heard(told) == [RangeInvalidated(source="notifier", start_uaddr=START_UADDR, page_count=3)]
