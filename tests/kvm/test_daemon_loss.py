"""What the daemon's loss takes from the guest, when memslots run short and when KVM refuses."""

from __future__ import annotations

import errno
import itertools
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import pytest

from fakes.eventually import PATIENCE, eventually
from fakes.kvm_ports import FakeSlots
from intercept_client.kvm._daemon_loss import DaemonLoss, OnDaemonLoss
from intercept_client.kvm._guest_memory import GuestMemory
from intercept_protocol.addresses import GfnRange, UaddrRange
from intercept_protocol.errors import WireError
from intercept_protocol.messages import RegionKind
from intercept_protocol.outcomes import Access

RW = Access.READ | Access.WRITE
LOW_RAM, BAR, HIGH_RAM = GfnRange.of(0, 4), GfnRange.of(4, 4), GfnRange.of(8, 4)
"""Contiguous for the guest and in the VMM."""
SECOND_BAR = GfnRange.of(0x100, 4)
OTHER_RAM = GfnRange.of(0x200, 0x100)


class Guest:
    """A VMM's memory, its regions, and the reasons that it was given for the loss."""

    def __init__(self, slots: FakeSlots) -> None:
        self.memory = GuestMemory(slots)
        self.told: list[str] = []
        self.loss = DaemonLoss(self.memory, OnDaemonLoss.KEEP_RAM, self.told.append)

    def add(self, gfns: GfnRange, kind: RegionKind) -> None:
        self.loss.region_added(gfns, kind)

    def map(self, gfns: GfnRange) -> None:
        self.memory.map(gfns, UaddrRange(start=gfns.start + 0x7000, end=gfns.end + 0x7000), RW)


def guest_with_full_slots(slots: FakeSlots) -> Guest:
    """Everything that may be merged has been, and no slot is free."""
    guest = Guest(slots)
    for gfns in (LOW_RAM, HIGH_RAM, OTHER_RAM):
        guest.add(gfns, RegionKind.MOVABLE)
    for gfns in (BAR, SECOND_BAR):
        guest.add(gfns, RegionKind.MMIO)
    for gfns in (LOW_RAM, BAR, HIGH_RAM):
        for start in (gfns.start, gfns.start + 2):
            guest.map(GfnRange.of(start, 2))
    guest.map(SECOND_BAR)
    with suppress(WireError):  # ENOSPC
        for start in itertools.count(OTHER_RAM.start, 5):
            guest.map(GfnRange.of(start, 3))
    guest.memory.unmap(GfnRange.of(OTHER_RAM.start + 1, 1))
    assert len(slots.held) == slots.slot_limit
    return guest


def test_mmio_between_ram_goes_and_all_ram_stays_though_no_memslot_is_free() -> None:
    slots = FakeSlots(8)
    guest = guest_with_full_slots(slots)
    ram = {gfn for gfn in slots.reached() if gfn not in BAR and gfn not in SECOND_BAR}

    guest.loss.lose("the daemon is gone")

    assert slots.reached().keys() == ram
    assert guest.told == ["the daemon is gone"]


def test_a_region_can_be_unmapped_whole_though_no_memslot_is_free() -> None:
    """So that a refused unmap does not cost the partition."""
    slots = FakeSlots(8)
    guest = guest_with_full_slots(slots)

    guest.memory.unmap(BAR)

    assert not guest.memory.reaches(BAR.start, Access.READ)


def test_neighbours_of_a_region_that_was_removed_are_merged_again() -> None:
    guest = Guest(FakeSlots(2))
    guest.add(LOW_RAM, RegionKind.MOVABLE)
    guest.map(LOW_RAM)
    guest.map(BAR)
    guest.loss.region_removed(LOW_RAM)

    guest.map(SECOND_BAR)

    assert [slot.gfns for slot in guest.memory.slots] == [GfnRange.of(0, 8), SECOND_BAR]


def test_unmapping_behind_part_of_a_slot_takes_all_of_it_when_no_memslot_is_free() -> None:
    slots = FakeSlots(1)
    guest = Guest(slots)
    guest.map(LOW_RAM)

    guest.memory.unmap_behind(UaddrRange(start=0x7001, end=0x7002))

    assert slots.held == {}


@pytest.mark.parametrize("refused", [{1}, {2}, {3}, {2, 3}, {3, 4}, {3, 5}, {3, 4, 5}])
def test_unmap_behind_when_kvm_refuses_some_calls_still_takes_the_range_from_the_guest(
    refused: set[int],
) -> None:
    """Up to an undo that fails as well. Another try at the same slot succeeds."""
    slots = FakeSlots(8)
    guest = Guest(slots)
    guest.map(LOW_RAM)
    guest.map(SECOND_BAR)
    slots.calls, slots.refuse_at = 0, refused

    guest.memory.unmap_behind(UaddrRange(start=0x7001, end=0x7002))

    assert 1 not in slots.reached()
    assert slots.reached().keys() >= set(range(0x100, 0x104))
    assert sorted(slots.held) == sorted(slot.slot_id for slot in guest.memory.slots)


def test_unmap_behind_waits_for_an_access_to_a_slot_that_kvm_lost() -> None:
    slots = FakeSlots()
    guest = Guest(slots)
    guest.map(LOW_RAM)
    claim = guest.memory.claim(1, Access.WRITE)
    assert claim is not None
    slots.calls, slots.refuse_at = 0, {2, 3}

    with ThreadPoolExecutor(1) as threads:
        unmapping = threads.submit(guest.memory.unmap_behind, UaddrRange(start=0x7001, end=0x7002))
        eventually(lambda: slots.calls, 3)
        eventually(lambda: guest.memory.reaches(1, Access.READ), False)
        assert not unmapping.done()
        guest.memory.release(claim)
        unmapping.result(PATIENCE)


def test_a_revoke_that_waits_for_an_access_tolerates_another_unmap_of_its_range() -> None:
    """It deletes its slots before it waits: the wait lets others change them."""
    slots = FakeSlots()
    guest = Guest(slots)
    guest.map(LOW_RAM)
    guest.map(BAR)
    claim = guest.memory.claim(1, Access.WRITE)
    assert claim is not None
    slots.calls, slots.refuse_at = 0, {3}

    with ThreadPoolExecutor(1) as threads:
        revoking = threads.submit(guest.memory.revoke, [GfnRange(start=1, end=BAR.end)])
        eventually(lambda: slots.calls >= 6 and not guest.memory.reaches(1, Access.READ), True)
        guest.memory.unmap(BAR)
        guest.memory.release(claim)
        revoking.result(PATIENCE)

    assert slots.held == {}


def test_a_slot_that_kvm_does_not_delete_is_reported_and_all_other_mmio_goes() -> None:
    slots = FakeSlots()
    guest = Guest(slots)
    for gfns in (BAR, SECOND_BAR):
        guest.add(gfns, RegionKind.MMIO)
        guest.map(gfns)
    slots.calls, slots.refuse_at = 0, {1, 2}

    guest.loss.lose("the daemon is gone")

    assert slots.reached().keys() == set(range(BAR.start, BAR.end))
    (why,) = guest.told
    assert why.startswith("the daemon is gone; the guest still reaches memory that it should not: ENOMEM")
    assert guest.loss.why == why


def test_unmap_behind_raises_when_kvm_does_not_delete_a_slot() -> None:
    slots = FakeSlots()
    guest = Guest(slots)
    guest.map(BAR)
    slots.calls, slots.refuse_at = 0, {1, 2}

    with pytest.raises(WireError) as refused:
        guest.memory.unmap_behind(UaddrRange(start=0x7004, end=0x7008))

    assert refused.value.number == errno.ENOMEM


def test_a_region_that_is_asked_for_twice_is_unmapped_though_the_second_was_refused() -> None:
    guest = Guest(FakeSlots())
    guest.add(BAR, RegionKind.MMIO)
    guest.map(BAR)
    guest.loss.region_refused(guest.loss.region_added(BAR, RegionKind.MMIO))

    guest.loss.lose("the daemon is gone")

    assert not guest.memory.reaches(BAR.start, Access.READ)
