"""What changes for a map and an unmap, against a table of single pages."""

from __future__ import annotations

import errno

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fakes.kvm_ports import FakeSlots
from intercept_client.kvm._guest_memory import GuestMemory
from intercept_client.kvm._memslots import Memslot, MemslotTable
from intercept_protocol.addresses import GfnRange, UaddrRange
from intercept_protocol.errors import WireError
from intercept_protocol.outcomes import Access

RW = Access.READ | Access.WRITE


def gfns(start: int, end: int) -> GfnRange:
    return GfnRange(start=start, end=end)


def behind(range_: GfnRange, shift: int = 0x7000) -> UaddrRange:
    return UaddrRange(start=range_.start + shift, end=range_.end + shift)


def mapped(table: MemslotTable, range_: GfnRange, shift: int = 0x7000, access: Access = RW) -> None:
    table.apply(table.plan_map(range_, behind(range_, shift), access))


def test_a_map_takes_the_lowest_free_slot() -> None:
    table = MemslotTable(8)
    for start in (0, 10, 20):
        mapped(table, gfns(start, start + 1))
    table.apply(table.plan_unmap(gfns(10, 11)))

    mapped(table, gfns(30, 31))

    assert [slot.slot_id for slot in table] == [0, 2, 1]


def test_neighbours_of_one_memory_stay_slots_of_their_own() -> None:
    table = MemslotTable(8)
    mapped(table, gfns(0, 4))
    mapped(table, gfns(4, 8))

    assert [slot.gfns for slot in table] == [gfns(0, 4), gfns(4, 8)]


def test_an_unmap_in_the_middle_leaves_both_ends_at_their_uaddrs() -> None:
    table = MemslotTable(8)
    mapped(table, gfns(0, 8))

    change = table.plan_unmap(gfns(3, 5))
    table.apply(change)

    assert [(slot.gfns, slot.uaddrs) for slot in table] == [
        (gfns(0, 3), UaddrRange(start=0x7000, end=0x7003)),
        (gfns(5, 8), UaddrRange(start=0x7005, end=0x7008)),
    ]
    assert [slot.slot_id for slot in change.added] == [0, 1], "the id that is given back is taken first"


def test_mapping_a_mapped_range_again_changes_nothing() -> None:
    table = MemslotTable(8)
    mapped(table, gfns(0, 8))

    assert not table.plan_map(gfns(2, 4), behind(gfns(2, 4)), RW)


@pytest.mark.parametrize(("shift", "access"), [(0x9000, RW), (0x7000, Access.READ)])
def test_mapping_other_memory_or_rights_replaces(shift: int, access: Access) -> None:
    table = MemslotTable(8)
    mapped(table, gfns(0, 4))

    mapped(table, gfns(1, 2), shift, access)

    assert [(slot.gfns, slot.uaddr_page(slot.gfns.start), slot.access) for slot in table] == [
        (gfns(0, 1), 0x7000, RW),
        (gfns(1, 2), shift + 1, access),
        (gfns(2, 4), 0x7002, RW),
    ]


def test_a_change_that_takes_more_slots_than_kvm_has_is_enospc_and_changes_nothing() -> None:
    table = MemslotTable(2)
    mapped(table, gfns(0, 4))
    mapped(table, gfns(8, 12))

    with pytest.raises(WireError) as caught:
        table.plan_unmap(gfns(9, 10))

    assert caught.value.number == errno.ENOSPC
    assert [slot.gfns for slot in table] == [gfns(0, 4), gfns(8, 12)]


def test_at_the_limit_a_map_that_replaces_a_whole_slot_fits() -> None:
    table = MemslotTable(1)
    mapped(table, gfns(0, 4))

    mapped(table, gfns(0, 4), 0x9000)

    assert [slot.uaddrs.start for slot in table] == [0x9000]


def test_every_alias_of_a_uaddr_range_is_found() -> None:
    table = MemslotTable(8)
    mapped(table, gfns(0, 4))
    table.apply(table.plan_map(gfns(0x100, 0x104), behind(gfns(0, 4)), RW))

    assert table.behind(behind(gfns(3, 9))) == [gfns(3, 4), gfns(0x103, 0x104)]


steps = st.tuples(
    st.integers(0, 24),
    st.integers(1, 8),
    st.sampled_from([0x7000, 0x9000]),
    st.sampled_from([RW, Access.READ, Access.NONE]),
)


@given(st.lists(steps, max_size=30))
def test_any_sequence_of_maps_agrees_with_a_table_of_pages(
    sequence: list[tuple[int, int, int, Access]],
) -> None:
    slots = FakeSlots()
    memory = GuestMemory(slots)
    pages: dict[int, tuple[int, bool]] = {}
    for start, count, shift, access in sequence:
        range_ = gfns(start, start + count)
        memory.map(range_, behind(range_, shift), access)
        for gfn in range(start, start + count):
            pages.pop(gfn, None)
            if access:
                pages[gfn] = (gfn + shift, Access.WRITE in access)

    assert slots.reached() == pages
    assert sorted(slots.held) == sorted(slot.slot_id for slot in memory.slots)


def test_a_part_of_a_slot_is_the_same_memory() -> None:
    slot = Memslot(3, gfns(0x10, 0x20), UaddrRange(start=0x50, end=0x60), RW)

    assert slot.part(gfns(0x18, 0x1A), 4) == Memslot(
        4, gfns(0x18, 0x1A), UaddrRange(start=0x58, end=0x5A), RW
    )
