"""Changing what the guest reaches: all or nothing, and not while an access is being completed."""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest

from fakes.eventually import PATIENCE, eventually
from fakes.kvm_ports import FakeSlots
from intercept_client._hypervisor_session import MapRequest
from intercept_client.kvm._guest_memory import GuestMemory
from intercept_client.kvm._run_gate import RunGate
from intercept_protocol.addresses import GfnRange, UaddrRange
from intercept_protocol.errors import WireError
from intercept_protocol.outcomes import Access

RW = Access.READ | Access.WRITE
WHOLE, MIDDLE = GfnRange(start=0, end=8), GfnRange(start=3, end=5)
MEMORY = UaddrRange(start=0x7000, end=0x7008)


def memory_with_one_slot(slots: FakeSlots) -> GuestMemory:
    memory = GuestMemory(slots)
    memory.map(WHOLE, MEMORY, RW)
    slots.calls = 0
    return memory


@pytest.mark.parametrize("call", [1, 2, 3, 4])
def test_a_map_that_kvm_refuses_half_way_leaves_all_as_it_was(call: int) -> None:
    slots = FakeSlots()
    memory = memory_with_one_slot(slots)
    before = slots.reached(), memory.slots
    slots.refuse_at = {call}

    with pytest.raises(WireError) as caught:
        memory.map(MIDDLE, UaddrRange(start=0x9000, end=0x9002), RW)

    assert caught.value.number == errno.ENOMEM
    assert (slots.reached(), memory.slots) == before


def test_a_failed_undo_propagates_and_lost_memory_is_not_counted_as_reached() -> None:
    slots = FakeSlots()
    memory = memory_with_one_slot(slots)
    memory.map(GfnRange(start=0x10, end=0x18), UaddrRange(start=0x9000, end=0x9008), RW)
    slots.calls, slots.refuse_at = 0, {2, 3}

    with pytest.raises(OSError, match="Cannot allocate"):
        memory.unmap(MIDDLE)

    assert memory.claim(0, Access.READ) is None
    memory.unmap(GfnRange(start=0, end=0x100))
    assert slots.held == {}


@pytest.mark.parametrize("access", [Access.WRITE, Access.EXECUTE])
def test_rights_that_kvm_cannot_give_are_refused(access: Access) -> None:
    with pytest.raises(WireError) as caught:
        GuestMemory(FakeSlots()).map(WHOLE, MEMORY, access)

    assert caught.value.number == errno.EOPNOTSUPP


def test_read_only_memory_is_refused_where_kvm_has_no_such_slots() -> None:
    memory = GuestMemory(FakeSlots(has_read_only_slots=False))

    with pytest.raises(WireError) as caught:
        memory.map(WHOLE, MEMORY, Access.READ)

    assert caught.value.number == errno.EOPNOTSUPP


def test_no_access_means_no_memslot() -> None:
    slots = FakeSlots()
    memory = memory_with_one_slot(slots)

    memory.map(MIDDLE, UaddrRange(start=0x7003, end=0x7005), Access.NONE)

    assert sorted(slots.reached()) == [0, 1, 2, 5, 6, 7]


def test_a_claim_is_of_the_page_behind_the_gfn_and_only_with_the_right() -> None:
    memory = GuestMemory(FakeSlots())
    memory.map(WHOLE, MEMORY, Access.READ)

    claim = memory.claim(5, Access.READ)

    assert claim is not None
    assert claim.uaddr == 0x7005_000
    assert memory.claim(5, Access.WRITE) is None
    assert memory.claim(8, Access.READ) is None


def test_an_unmap_returns_only_when_the_claims_in_its_range_are_released() -> None:
    slots = FakeSlots()
    memory = memory_with_one_slot(slots)
    inside, outside = memory.claim(3, Access.WRITE), memory.claim(7, Access.READ)
    assert inside is not None
    assert outside is not None
    with ThreadPoolExecutor(1) as threads:
        unmapping = threads.submit(memory.unmap, MIDDLE)
        eventually(lambda: 3 in slots.reached(), False)

        assert memory.claim(3, Access.READ) is None, "none begins any more"
        assert memory.claim(2, Access.READ) is not None, "nor does it stop others"
        assert not unmapping.done()
        memory.release(outside)
        assert not unmapping.done()
        memory.release(inside)
        unmapping.result(PATIENCE)


@pytest.mark.parametrize(
    "unmap_again",
    [
        lambda memory: memory.unmap(MIDDLE),
        lambda memory: memory.revoke([WHOLE]),
        lambda memory: memory.unmap_behind(MEMORY),
    ],
    ids=["unmap", "revoke", "unmap_behind"],
)
def test_an_unmap_of_what_another_thread_is_unmapping_waits_for_its_claims_too(
    unmap_again: Callable[[GuestMemory], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second caller may give the memory away as soon as its own call returns."""
    waits: list[threading.Condition] = []

    class Noted(threading.Condition):
        def wait(self, timeout: float | None = None) -> bool:
            waits.append(self)
            return super().wait(timeout)

    with monkeypatch.context() as patched:
        patched.setattr(threading, "Condition", Noted)
        memory = memory_with_one_slot(FakeSlots())
    claim = memory.claim(3, Access.WRITE)
    assert claim is not None
    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(memory.unmap, WHOLE)
        eventually(lambda: len(waits), 1)
        second = threads.submit(unmap_again, memory)
        eventually(lambda: second.done() or len(waits) == 2, True)
        early = second.done()
        memory.release(claim)
        first.result(PATIENCE)
        second.result(PATIENCE)
    assert not early, "it returned while the access was under way"


def test_frozen_memory_refuses_maps_and_still_unmaps() -> None:
    memory = memory_with_one_slot(FakeSlots())
    memory.freeze("the daemon is gone")

    with pytest.raises(WireError, match="the daemon is gone"):
        memory.map(WHOLE, MEMORY, RW)
    memory.unmap_behind(UaddrRange(start=0x7002, end=0x7004))

    assert [slot.gfns for slot in memory.slots] == [GfnRange(start=0, end=2), GfnRange(start=4, end=8)]


class Racer:
    """A vCPU in the guest that leaves when it is kicked, and notes what is mapped then."""

    def __init__(self, memory: GuestMemory, slots: FakeSlots) -> None:
        self._memory = memory
        self._slots = slots
        self.saw: list[int] = []

    def kick(self) -> None:
        self.saw.append(len(self._slots.held))
        threading.Thread(target=self._memory.gate.leave, args=(self,)).start()


def test_slots_go_only_when_every_vcpu_has_left_the_guest() -> None:
    slots = FakeSlots()
    memory = memory_with_one_slot(slots)
    racer = Racer(memory, slots)
    memory.gate.enter(racer)

    memory.unmap(WHOLE)

    assert racer.saw == [1], "kicked while the slot was there"
    assert slots.held == {}


def test_slots_that_only_come_disturb_no_vcpu() -> None:
    slots = FakeSlots()
    memory = GuestMemory(slots)
    racer = Racer(memory, slots)
    memory.gate.enter(racer)

    memory.map(WHOLE, MEMORY, RW)

    assert racer.saw == []


# ------------------------------------------------ lists


PAGES = [GfnRange(start=gfn, end=gfn + 1) for gfn in (1, 3, 6)]


def requests(access: Access) -> list[MapRequest]:
    return [
        MapRequest(gfns, UaddrRange(start=0x9000 + gfns.start, end=0x9001 + gfns.start), access, None)
        for gfns in PAGES
    ]


class CountedGate(RunGate):
    """Counts how often vCPUs have to stop."""

    def __init__(self) -> None:
        super().__init__()
        self.stops = 0
        self._depth = 0

    @contextmanager
    def closed(self) -> Iterator[None]:
        self.stops += self._depth == 0
        self._depth += 1
        with super().closed():
            yield
        self._depth -= 1


def test_lists_that_take_away_stop_the_vcpus_once() -> None:
    def one_by_one(memory: GuestMemory) -> None:
        for gfns in PAGES:
            memory.unmap(gfns)

    unmaps: list[Callable[[GuestMemory], None]] = [
        lambda memory: memory.unmap_list(PAGES),
        lambda memory: memory.map_list(requests(Access.NONE)),
        one_by_one,
    ]
    stops = []
    for unmap in unmaps:
        slots = FakeSlots()
        memory = memory_with_one_slot(slots)
        memory.gate = gate = CountedGate()
        racer = Racer(memory, slots)
        gate.enter(racer)
        unmap(memory)
        stops.append(gate.stops)
        assert (racer.saw, sorted(slots.reached())) == ([1], [0, 2, 4, 5, 7])
    assert stops == [1, 1, 3]


def test_a_list_of_maps_is_carried_out_piece_by_piece() -> None:
    slots = FakeSlots()
    memory = GuestMemory(slots)
    racer = Racer(memory, slots)
    memory.gate.enter(racer)

    memory.map_list(requests(RW))

    assert (sorted(slots.reached()), racer.saw) == ([1, 3, 6], [])


@pytest.mark.parametrize(("call", "done"), [(1, 0), (2, 1), (3, 2)])
def test_a_refused_list_of_maps_says_how_many_were_done_and_those_stay(call: int, done: int) -> None:
    slots = FakeSlots()
    memory = GuestMemory(slots)
    slots.refuse_at = {call}

    with pytest.raises(WireError) as caught:
        memory.map_list(requests(RW))

    assert (caught.value.number, caught.value.details) == (errno.ENOMEM, {"done": done})
    assert sorted(slots.reached()) == [1, 3, 6][:done]


@pytest.mark.parametrize(("call", "done"), [(1, 0), (4, 1), (7, 2)])
def test_a_refused_list_of_unmaps_says_how_many_were_done(call: int, done: int) -> None:
    slots = FakeSlots()
    memory = memory_with_one_slot(slots)
    slots.refuse_at = {call}

    with pytest.raises(WireError) as caught:
        memory.unmap_list(PAGES)

    assert (caught.value.number, caught.value.details) == (errno.ENOMEM, {"done": done})
    assert sorted(set(range(8)) - set(slots.reached())) == [1, 3, 6][:done]


@pytest.mark.parametrize("gfns", PAGES, ids=str)
def test_a_list_returns_when_no_access_to_any_of_it_is_under_way_and_lets_vcpus_run_meanwhile(
    gfns: GfnRange,
) -> None:
    """An access may have to walk the guest's page tables, for which its vCPU enters the gate."""
    memory = memory_with_one_slot(FakeSlots())
    claim = memory.claim(gfns.start, Access.READ)
    assert claim is not None
    with ThreadPoolExecutor(1) as threads:
        unmapping = threads.submit(memory.unmap_list, PAGES)
        eventually(lambda: len(memory.slots), 4)
        with memory.gate.inside(Racer(memory, FakeSlots())):
            assert not unmapping.done()
        memory.release(claim)
        unmapping.result(PATIENCE)
