"""Memslots that run short: what continues is merged, and nothing else changes."""

from __future__ import annotations

import errno
from collections.abc import Container, Sequence
from itertools import cycle, pairwise

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from fakes.kvm_ports import FakeSlots
from intercept_client.kvm import _memslots as memslots
from intercept_client.kvm._daemon_loss import DaemonLoss, OnDaemonLoss
from intercept_client.kvm._guest_memory import GuestMemory
from intercept_client.kvm._memslots import MERGE_STEP, SLOT_PAGE_LIMIT
from intercept_protocol.addresses import PAGE_SHIFT, GfnRange, Uaddr, UaddrRange
from intercept_protocol.errors import WireError
from intercept_protocol.messages import RegionKind
from intercept_protocol.outcomes import Access

RW = Access.READ | Access.WRITE
LIMIT = 7
"""Below 8, no slot is kept for unmaps."""
Pages = dict[int, tuple[int, bool]]
"""By gfn: the uaddr page, and whether the guest may write it."""


def map_pages(
    memory: GuestMemory, start: int, count: int = 1, shift: int = 0x7000, access: Access = RW
) -> None:
    memory.map(
        GfnRange(start=start, end=start + count),
        UaddrRange(start=start + shift, end=start + count + shift),
        access,
    )


def memory_of(slots: FakeSlots, *starts: int) -> GuestMemory:
    """Single pages of one memory."""
    memory = GuestMemory(slots)
    for start in starts:
        map_pages(memory, start)
    return memory


def uaddr_of(page: int) -> Uaddr:
    return Uaddr(page << PAGE_SHIFT)


def slots_for(count: int) -> FakeSlots:
    """So many that maps may take `count`."""
    return FakeSlots(count * 8 // 7)


def fewest_slots(pages: Pages, boundaries: Container[int]) -> int:
    """How many slots hold these pages if all that continues within a region is merged."""
    return sum(
        gfn in boundaries or pages.get(gfn - 1) != (uaddr - 1, writable)
        for gfn, (uaddr, writable) in pages.items()
    )


def test_more_windows_than_slots_are_all_reached() -> None:
    slots = FakeSlots(LIMIT)

    memory_of(slots, *range(100))

    assert slots.reached() == {gfn: (gfn + 0x7000, True) for gfn in range(100)}
    assert len(slots.held) <= LIMIT


def test_while_there_is_room_nothing_is_merged() -> None:
    slots = FakeSlots(LIMIT)

    memory_of(slots, *range(LIMIT))

    assert slots.calls == LIMIT


@pytest.mark.parametrize(
    ("start", "shift", "access"),
    [(1, 0x9000, RW), (1, 0x7000, Access.READ), (2, 0x6FFF, RW)],
    ids=["other memory", "other rights", "a gap for the guest"],
)
def test_neighbours_that_do_not_continue_each_other_are_never_merged(
    start: int, shift: int, access: Access
) -> None:
    memory = memory_of(FakeSlots(2), 0)
    map_pages(memory, start, shift=shift, access=access)

    with pytest.raises(WireError) as refused:
        map_pages(memory, 8)

    assert refused.value.number == errno.ENOSPC


def test_at_the_limit_a_map_that_continues_a_slot_lengthens_it() -> None:
    slots = FakeSlots(2)
    memory = memory_of(slots, 0, 0x100)

    map_pages(memory, 1)

    assert [slot.gfns for slot in memory.slots] == [
        GfnRange(start=0, end=2),
        GfnRange(start=0x100, end=0x101),
    ]
    assert sorted(slots.reached()) == [0, 1, 0x100]


def test_at_the_limit_an_unmap_in_the_middle_finds_room_for_both_ends() -> None:
    slots = FakeSlots(3)
    memory = GuestMemory(slots)
    map_pages(memory, 0, 8)
    map_pages(memory, 0x100)
    map_pages(memory, 0x101)

    memory.unmap(GfnRange(start=3, end=5))

    assert sorted(slots.reached()) == [0, 1, 2, 5, 6, 7, 0x100, 0x101]


def test_maps_leave_an_eighth_of_the_slots_to_unmaps() -> None:
    slots = FakeSlots(8)
    memory = GuestMemory(slots)
    for start in range(0, 7 * 8, 8):
        map_pages(memory, start, 3)

    with pytest.raises(WireError):
        map_pages(memory, 0x100)
    memory.unmap(GfnRange(start=1, end=2))

    assert len(slots.held) == 8


def test_a_map_that_takes_no_more_slots_fits_when_unmaps_have_taken_theirs() -> None:
    slots = FakeSlots(8)
    memory = GuestMemory(slots)
    for start in range(0, 7 * 8, 8):
        map_pages(memory, start, 3)
    memory.unmap(GfnRange(start=1, end=2))

    map_pages(memory, 8, 3, shift=0x9000)

    assert slots.reached()[8] == (0x9008, True)


@pytest.mark.parametrize(
    ("starts", "merged"),
    [(range(3 * MERGE_STEP), 1), ([n + n // 2 for n in range(3 * MERGE_STEP)], MERGE_STEP // 2)],
    ids=["one run", "pairs"],
)
def test_one_change_merges_a_bounded_number_of_slots(starts: Sequence[int], merged: int) -> None:
    slots = slots_for(len(starts))
    memory = memory_of(slots, *starts)
    slots.calls = 0

    map_pages(memory, 0x1000)

    assert slots.calls == MERGE_STEP + merged + 1, "those that go, the merged ones, the new one"
    assert len(slots.held) == 2 * MERGE_STEP + merged + 1


def test_small_slots_are_merged_before_large_ones() -> None:
    """KVM takes longer to make a large slot."""
    memory = memory_of(slots_for(3 * MERGE_STEP), *range(5 * MERGE_STEP - 2))

    assert max(slot.gfns.page_count for slot in memory.slots) == MERGE_STEP


def test_a_run_across_the_place_where_the_search_begins_is_found() -> None:
    memory = memory_of(FakeSlots(3), 0, 1, 0x10)
    map_pages(memory, 2)  # merges 0 to 2, so the next search begins behind them

    map_pages(memory, 3)
    map_pages(memory, 0x20)

    assert [slot.gfns.start for slot in memory.slots] == [0, 0x10, 0x20]


def test_a_change_that_takes_two_slots_more_finds_two() -> None:
    memory = memory_of(FakeSlots(6), 0, 1, 0x10, 0x20, 0x30, 0x38)
    map_pages(memory, 2)  # merges 0 to 2, so the next search begins behind them
    memory.unmap(GfnRange(start=0x20, end=0x40))
    for start in (3, 0x40, 0x41):
        map_pages(memory, start)
    map_pages(memory, 0x100, 8)

    map_pages(memory, 0x104, shift=0x9000)

    assert [slot.gfns.start for slot in memory.slots] == [0, 0x10, 0x40, 0x100, 0x104, 0x105]


def test_no_slot_is_larger_than_kvm_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memslots, "SLOT_PAGE_LIMIT", 5)
    memory = memory_of(FakeSlots(2), *range(10))

    assert [slot.gfns.page_count for slot in memory.slots] == [5, 5]
    assert SLOT_PAGE_LIMIT == 0x7FFF_FFFF


@pytest.mark.parametrize("call", range(1, LIMIT + 3))
def test_a_merge_that_kvm_refuses_half_way_leaves_all_as_it_was(call: int) -> None:
    slots = FakeSlots(LIMIT)
    memory = memory_of(slots, *range(LIMIT))
    before = slots.reached(), memory.slots
    slots.calls, slots.refuse_at = 0, {call}

    with pytest.raises(WireError) as refused:
        map_pages(memory, 0x100)

    assert refused.value.number == errno.ENOMEM
    assert (slots.reached(), memory.slots) == before


def test_a_merge_does_not_wait_for_an_access_that_is_being_completed() -> None:
    """Its memory stays where it is."""
    memory = memory_of(FakeSlots(LIMIT), *range(LIMIT))
    claim = memory.claim(3, Access.WRITE)
    assert claim is not None

    map_pages(memory, 0x100)
    memory.release(claim)

    assert len(memory.slots) == 2


END = 32
"""Regions cover the gfns below it."""
map_or_unmap = st.tuples(
    st.integers(0, 24),
    st.integers(1, 6),
    st.sampled_from([0x7000, 0x7000, 0x7000, 0x6FFF, 0x9000]),
    st.sampled_from([RW, RW, RW, Access.READ, Access.NONE]),
)
unmap_behind = st.builds(UaddrRange.of_pages, st.integers(0x7000, 0x7018).map(uaddr_of), st.integers(1, 3))


@example(1, set(), [(0, 4, 0x7000, RW), UaddrRange(start=0x7001, end=0x7002)])
@example(3, {2, 4}, [(start, 2, 0x7000, RW) for start in (0, 2, 4, 10, 14)])
@given(
    st.integers(1, 9),
    st.sets(st.integers(1, END - 1), max_size=4),
    st.lists(map_or_unmap | unmap_behind, min_size=5, max_size=40),
)
def test_a_change_is_refused_only_if_it_does_not_fit_after_merging_everything(
    limit: int, edges: set[int], sequence: list[tuple[int, int, int, Access] | UaddrRange]
) -> None:
    """And the guest never reaches what it should not, and at the daemon's loss exactly its RAM."""
    slots = FakeSlots(limit)
    memory = GuestMemory(slots)
    loss = DaemonLoss(memory, OnDaemonLoss.KEEP_RAM, list[str]().append)
    starts = [0, *sorted(edges)]
    regions = [GfnRange(start=start, end=end) for start, end in pairwise([*starts, END])]
    for region, kind in zip(regions, cycle((RegionKind.MOVABLE, RegionKind.MMIO)), strict=False):
        loss.region_added(region, kind)
    pages: Pages = {}
    for step in sequence:
        if isinstance(step, UaddrRange):
            memory.unmap_behind(step)
            wanted = {gfn: there for gfn, there in pages.items() if there[0] not in step}
            assert slots.reached().items() <= wanted.items()
            pages = slots.reached()
        else:
            pages = mapped_or_unmapped(memory, limit, regions, pages, step)
        assert slots.reached() == pages
        assert sorted(slots.held) == sorted(slot.slot_id for slot in memory.slots)
        assert len(slots.held) <= limit

    loss.lose("the daemon is gone")

    ram = [gfn for region in regions[::2] for gfn in range(region.start, region.end)]
    assert slots.reached() == {gfn: there for gfn, there in pages.items() if gfn in ram}


def mapped_or_unmapped(
    memory: GuestMemory,
    limit: int,
    regions: list[GfnRange],
    pages: Pages,
    step: tuple[int, int, int, Access],
) -> Pages:
    """Take a step within one region, as the daemon does; what the guest should reach then."""
    start, count, shift, access = step
    (region,) = (region for region in regions if start in region)
    gfns = range(start, min(start + count, region.end))
    wanted = {gfn: there for gfn, there in pages.items() if gfn not in gfns}
    if access:
        wanted |= {gfn: (gfn + shift, Access.WRITE in access) for gfn in gfns}
    try:
        map_pages(memory, start, len(gfns), shift, access)
    except WireError:
        boundaries = {region.start for region in regions}
        assert fewest_slots(wanted, boundaries) > (limit - limit // 8 if access else limit)
        return pages
    return wanted
