"""Instructions that are more than one access: locked ones, and those that could not be fetched."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import cast

import pytest

from fakes.eventually import eventually
from fakes.kvm_ports import ScriptedDecider, ScriptedVcpu
from fakes.vcpu_rig import GFN, GPA, LOCKED_INCREMENT, RW, Rig
from intercept_client.kvm import Bus, GuestVcpu
from intercept_client.kvm._exits import (
    Exit,
    Halted,
    HostFault,
    Interrupted,
    MmioRead,
    MmioWrite,
    NotEmulated,
)
from intercept_client.kvm._fetch_fault import FetchFault
from intercept_client.kvm._stop import Stop, StopReason, VcpuStopped
from intercept_client.kvm._vcpu import Vcpu
from intercept_protocol.addresses import PAGE_SIZE, GfnRange, UaddrRange
from intercept_protocol.outcomes import Access, Answer


def test_a_locked_write_whose_memory_went_after_its_read_is_dropped_and_run_again(rig: Rig) -> None:
    rig.map()
    rig.code = LOCKED_INCREMENT
    rig.put(0, b"\x07\0\0\0")
    loop = rig.script([MmioRead(GPA, 4), MmioWrite(GPA, b"\x01\0\0\0"), Interrupted()])
    before = rig.vcpu.registers = tuple(range(18))

    loop.run()

    assert rig.get(0, 4) == b"\x07\0\0\0"
    assert rig.vcpu.registers == before
    assert loop.tally.replayed == 1


@pytest.mark.parametrize("code", [b"\xff\x06", b"\x66\x89\x06"], ids=["inc", "mov"])
def test_a_write_of_an_instruction_that_is_not_locked_is_stored(rig: Rig, code: bytes) -> None:
    rig.map()
    rig.code = code
    loop = rig.script([MmioRead(GPA, 4), MmioWrite(GPA, b"\x01\0\0\0")])

    loop.run()

    assert rig.get(0, 4) == b"\x01\0\0\0"
    assert loop.tally.replayed == 0


def test_a_write_after_the_guest_went_on_is_stored_whatever_was_read_before(rig: Rig) -> None:
    rig.map()
    rig.code = LOCKED_INCREMENT
    loop = rig.script([MmioRead(GPA, 4), Interrupted(), MmioWrite(GPA, b"\x01\0\0\0")])

    loop.run()

    assert rig.get(0, 4) == b"\x01\0\0\0"


# ------------------------------------------------ fetches and faults


def test_a_failed_fetch_asks_for_execution_and_runs_on(rig: Rig) -> None:
    loop = rig.script([NotEmulated()], [Answer.MAPPED], {0: GPA, 14: GPA + 14})

    assert loop.run().reason is StopReason.HALTED
    assert rig.wanted() == [(GFN, Access.EXECUTE)]


def test_a_failed_fetch_on_mapped_pages_is_tried_once_more_and_then_no_fetch(rig: Rig) -> None:
    rig.map(RW | Access.EXECUTE)
    loop = rig.script([NotEmulated(), NotEmulated()], [], {0: GPA, 14: GPA + 14})

    assert loop.run() == Stop(StopReason.NOT_EMULATED, GPA)


def test_an_instruction_across_pages_asks_for_the_second(rig: Rig) -> None:
    rig.memory.map(
        GfnRange(start=GFN, end=GFN + 1),
        UaddrRange(start=rig.uaddrs.start, end=rig.uaddrs.start + 1),
        Access(7),
    )
    second = {0: GPA + PAGE_SIZE - 2, 14: GPA + PAGE_SIZE + 12}
    loop = rig.script([NotEmulated(), NotEmulated()], [Answer.MAPPED], second)

    assert loop.run().reason is StopReason.HALTED
    assert rig.wanted() == [(GFN + 1, Access.EXECUTE)]


def test_a_fetch_that_the_guests_own_tables_do_not_map_stops(rig: Rig) -> None:
    assert rig.script([NotEmulated()]).run().reason is StopReason.NOT_EMULATED


def test_a_host_fault_with_its_gpa_is_an_intercept_of_it(rig: Rig) -> None:
    loop = rig.script([HostFault(GPA + 5)], [Answer.MAPPED])

    assert loop.run().reason is StopReason.HALTED
    assert rig.wanted() == [(GFN, Access.READ)]


def test_a_host_fault_that_is_forwarded_stops_while_the_slot_is_there(rig: Rig) -> None:
    rig.map()
    loop = rig.script([HostFault(GPA)], [Answer.UNBACKED])

    assert loop.run() == Stop(StopReason.HOST_FAULT, GPA, Answer.UNBACKED)


def test_a_host_fault_whose_slot_was_revoked_runs_again_as_an_access(rig: Rig) -> None:
    loop = rig.script([HostFault(GPA), MmioRead(GPA, 1)], [Answer.UNBACKED, Answer.UNBACKED])

    assert loop.run().reason is StopReason.HALTED
    assert rig.vcpu.found == [b"\xff"]


def test_a_host_fault_without_a_gpa_looks_at_the_instruction(rig: Rig) -> None:
    loop = rig.script([HostFault(None)], [Answer.MAPPED], {0: GPA, 14: GPA + 14})

    assert loop.run().reason is StopReason.HALTED
    assert rig.wanted() == [(GFN, Access.EXECUTE)]


class Walked(ScriptedVcpu):
    """While KVM walks its page tables, memory of the guest is unmapped."""

    index = 3

    def __init__(self, rig: Rig, exits: Iterable[Exit] = ()) -> None:
        super().__init__(exits)
        self._rig = rig
        self.unmapping = threading.Thread(target=rig.unmap)

    def on_this_thread(self) -> AbstractContextManager[None]:
        return nullcontext()

    def instruction_gpa(self, offset: int = 0, registers: tuple[int, ...] | None = None) -> int | None:
        if not offset:
            self.unmapping.start()
        eventually(lambda: self.kicks > 0 or not self._rig.slots.held, True)
        assert self._rig.slots.held, "a memslot went that the page tables may lie in"
        return super().instruction_gpa(offset, registers)


def test_the_guests_page_tables_are_walked_while_no_memslot_is_out(rig: Rig) -> None:
    rig.map()
    rig.script([])
    vcpu = Walked(rig)
    fault = FetchFault(vcpu, rig.memory, rig.intercepts, lambda _: b"")

    with pytest.raises(VcpuStopped, match="not mapped by the guest"):
        fault.fetch(StopReason.NOT_EMULATED)

    vcpu.unmapping.join()
    assert rig.slots.held == {}


def test_the_guests_code_is_looked_for_while_no_memslot_is_out(rig: Rig) -> None:
    """A write after a read of the same place makes the loop look whether the instruction is a locked one."""
    rig.map()
    vcpu = Walked(rig, [MmioRead(GPA, 4), MmioWrite(GPA, bytes(4)), Halted()])
    guest = GuestVcpu(
        cast("Vcpu", vcpu),
        ScriptedDecider([Answer.UNBACKED]),
        memory=rig.memory,
        copier=rig.copier,
        devices=Bus(),
        ports=Bus(),
        on_lost=pytest.fail,
        kick=lambda _: None,
    )

    assert guest.run().reason is StopReason.HALTED

    vcpu.unmapping.join()
    assert rig.slots.held == {}
