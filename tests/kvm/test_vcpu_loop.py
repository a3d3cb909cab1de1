"""A vCPU's loop against scripted exits and answers: what is asked, what is completed, and why it stops."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Iterator

import pytest

from fakes.kvm_ports import FakeSlots, Hook, ScriptedDecider, ScriptedVcpu
from intercept_client import ConnectionLost, libc
from intercept_client.kvm.asking import Asker
from intercept_client.kvm.copying import CheckedCopier, Copier, DirectCopier
from intercept_client.kvm.devices import Bus, Window
from intercept_client.kvm.exits import (
    Broken,
    Exit,
    Halted,
    HostFault,
    Interrupted,
    MmioRead,
    MmioWrite,
    NotEmulated,
    PortRead,
    PortWrite,
    Shutdown,
)
from intercept_client.kvm.fetch_fault import FetchFault
from intercept_client.kvm.guest_access import GuestAccess
from intercept_client.kvm.guest_memory import GuestMemory
from intercept_client.kvm.stop import Stop, StopReason
from intercept_client.kvm.tally import VcpuTally
from intercept_client.kvm.vcpu_loop import VcpuLoop
from intercept_client.libc import Sharing
from intercept_protocol.addresses import PAGE_SIZE, GfnRange, UaddrRange
from intercept_protocol.errors import WireError
from intercept_protocol.hv_message import InterceptMessage, MessageType, memory_access
from intercept_protocol.messages import Architecture
from intercept_protocol.outcomes import Access, Answer
from interceptctl.guest.emulated import Reports, Scratch

RW = Access.READ | Access.WRITE
GFN, GPA = 0x200, 0x200_000
SCRATCH = 0xFEB0_0000
LOCKED_INCREMENT = b"\xf0\xff\x06"


class Rig:
    """A loop whose every neighbour is scripted; two pages of memory that may be mapped at `GFN`."""

    def __init__(self, uaddrs: UaddrRange) -> None:
        self.uaddrs = uaddrs
        self.slots = FakeSlots()
        self.memory = GuestMemory(self.slots)
        self.scratch, self.reports = Scratch(PAGE_SIZE), Reports()
        self.lost: list[str] = []
        self.copier: Copier = DirectCopier()
        self.code = b""

    def script(
        self,
        exits: Iterable[Exit],
        answers: Iterable[Answer | Exception | Hook] = (),
        gpas: dict[int, int] | None = None,
    ) -> VcpuLoop:
        self.vcpu = ScriptedVcpu([*exits, Halted()], gpas)
        self.decider = ScriptedDecider(answers)
        tally = VcpuTally()
        self.asker = asker = Asker(3, self.decider, tally, self.lost.append)
        devices = Bus(Window(SCRATCH, PAGE_SIZE, self.scratch))
        self.loop = VcpuLoop(
            self.vcpu,
            asker=asker,
            access=GuestAccess(self.memory, self.copier, devices, asker, tally),
            fetch_fault=FetchFault(self.vcpu, self.memory, asker),
            gate=self.memory.gate,
            code=lambda _: self.code,
            ports=Bus(Window(0x10, 1, self.reports)),
            tally=tally,
        )
        return self.loop

    def map(self, access: Access = RW) -> None:
        self.memory.map(GfnRange(GFN, GFN + 2), self.uaddrs, access)

    def unmap(self) -> None:
        self.memory.unmap(GfnRange(GFN, GFN + 2))

    def put(self, offset: int, data: bytes) -> None:
        ctypes.memmove(self.uaddrs.start_uaddr + offset, data, len(data))

    def get(self, offset: int, size: int) -> bytes:
        return ctypes.string_at(self.uaddrs.start_uaddr + offset, size)

    def wanted(self) -> list[tuple[int, Access] | None]:
        return [memory_access(message, Architecture.X86_64) for message in self.decider.asked]


@pytest.fixture
def rig() -> Iterator[Rig]:
    uaddrs = libc.mmap(UaddrRange(0, 2), RW, Sharing.PRIVATE)
    yield Rig(uaddrs)
    libc.munmap(uaddrs)


def test_a_read_is_one_well_formed_intercept_and_completed_after_resume(rig: Rig) -> None:
    rig.put(8, b"\x11\x22\x33\x44")
    loop = rig.script([MmioRead(GPA + 8, 4), Interrupted()], [rig.map, Answer.MAPPED])

    stop = loop.run()

    assert stop == Stop(StopReason.HALTED)
    assert rig.vcpu.found == [b"\x11\x22\x33\x44"]
    (message,) = (InterceptMessage.parse(asked) for asked in rig.decider.asked)
    assert message.message_type == MessageType.UNMAPPED_GPA
    intercept = message.memory(Architecture.X86_64)
    assert intercept is not None
    assert (intercept.gpa, intercept.vp_index, intercept.access_type) == (GPA + 8, 3, 0)


@pytest.mark.parametrize("size", range(1, 9))
@pytest.mark.parametrize("offset", [16, 17, PAGE_SIZE - 3], ids=["aligned", "unaligned", "straddling"])
@pytest.mark.parametrize("copier", [DirectCopier(), CheckedCopier()], ids=["direct", "checked"])
def test_accesses_of_every_size_are_completed(rig: Rig, size: int, offset: int, copier: Copier) -> None:
    data = bytes(range(1, size + 1))
    rig.copier = copier
    rig.map()
    loop = rig.script([MmioWrite(GPA + offset, data), MmioRead(GPA + offset, size), Interrupted()])

    loop.run()

    assert rig.get(offset, size) == data
    assert rig.vcpu.found == [data]
    assert rig.get(offset - 1, 1) == rig.get(offset + size, 1) == b"\0"


def test_a_write_that_straddles_asks_for_each_page_that_is_not_there(rig: Rig) -> None:
    last = GfnRange(GFN + 1, GFN + 2)
    loop = rig.script(
        [MmioWrite(GPA + PAGE_SIZE - 2, b"abcd")], [Answer.UNBACKED, rig.map, Answer.MAPPED]
    )

    loop.run()

    assert rig.wanted() == [(GFN, Access.WRITE), (last.start, Access.WRITE)]
    assert rig.get(PAGE_SIZE - 2, 4) == b"\0\0cd"


def test_memory_that_goes_between_resume_and_completion_is_a_new_intercept(rig: Rig) -> None:
    """Unmapped and remapped meanwhile, it is never written through."""
    loop = rig.script(
        [MmioWrite(GPA, b"\x11")], [rig.map, rig.unmap, Answer.MAPPED, Answer.UNBACKED]
    )

    loop.run()

    assert rig.wanted() == [(GFN, Access.WRITE)] * 2
    assert rig.get(0, 1) == b"\0"
    assert loop.tally.forwarded == 1


def test_memory_that_is_gone_behind_its_slot_is_a_new_intercept(rig: Rig) -> None:
    """Under a userfaultfd alone the memslot may outlive the memory for a moment."""
    rig.copier = CheckedCopier()
    gone = libc.mmap(UaddrRange(0, 2), Access.NONE, Sharing.PRIVATE)
    rig.memory.map(GfnRange(GFN, GFN + 2), gone, RW)
    loop = rig.script(
        [MmioRead(GPA, 2), MmioWrite(GPA, b"\x11")],
        [Answer.ALREADY_MAPPED, rig.unmap, Answer.UNBACKED, Answer.UNBACKED],
    )

    loop.run()

    assert rig.vcpu.found == [b"\xff\xff"]
    assert len(rig.decider.asked) == 3
    libc.munmap(gone)


def test_what_is_mapped_by_now_is_completed_without_asking(rig: Rig) -> None:
    rig.map()
    loop = rig.script([MmioWrite(GPA, b"\x11")])

    loop.run()

    assert rig.get(0, 1) == b"\x11"
    assert rig.decider.asked == []


def test_a_read_only_slot_is_asked_about_writes_and_only_writes(rig: Rig) -> None:
    rig.map(Access.READ)
    loop = rig.script([MmioRead(GPA, 1), Interrupted(), MmioWrite(GPA, b"\x11")], [Answer.PERMISSION])

    loop.run()

    assert rig.wanted() == [(GFN, Access.WRITE)]
    assert rig.get(0, 1) == b"\0"


def test_retry_is_asked_again_until_it_is_decided(rig: Rig) -> None:
    answers = [Answer.INVALIDATING, Answer.CONTENDED, Answer.KICKED, Answer.DRAINING, Answer.NO_REGION]
    loop = rig.script([MmioRead(GPA, 4)], answers)

    stop = loop.run()

    assert stop.reason is StopReason.HALTED
    assert len(rig.decider.asked) == len(answers)
    assert rig.vcpu.found == [b"\xff" * 4]


@pytest.mark.parametrize("answer", [Answer.NO_PROGRESS, Answer.HYPERVISOR_ERROR])
def test_fail_stops_with_the_reason(rig: Rig, answer: Answer) -> None:
    loop = rig.script([MmioRead(GPA, 4)], [answer])

    assert loop.run() == Stop(StopReason.FAILED, GPA, answer)
    assert rig.vcpu.found == []


@pytest.mark.parametrize(
    "loss",
    [ConnectionLost("the connection ended"), TimeoutError("the daemon did not answer"), WireError(71, "nonsense")],
)
def test_a_daemon_that_does_not_decide_stops_the_vcpu_and_is_told_of(rig: Rig, loss: Exception) -> None:
    loop = rig.script([MmioRead(GPA, 4)], [loss])

    stop = loop.run()

    assert (stop.reason, stop.gpa) == (StopReason.DAEMON_LOST, GPA)
    assert rig.lost == [str(loss)]


def test_a_stop_while_retrying_leaves_the_exit_to_be_answered_at_the_next_run(rig: Rig) -> None:
    def stop() -> None:
        rig.loop.stop()

    loop = rig.script([MmioRead(GPA, 4), Interrupted()], [stop, Answer.KICKED, rig.map, Answer.MAPPED])

    assert loop.run().reason is StopReason.ASKED
    assert rig.vcpu.found == []
    assert loop.run().reason is StopReason.HALTED
    assert rig.vcpu.found == [bytes(4)]


def test_the_vmms_own_device_is_not_asked_about(rig: Rig) -> None:
    loop = rig.script([MmioWrite(SCRATCH + 4, b"ab"), MmioRead(SCRATCH + 4, 2)])

    loop.run()

    assert rig.vcpu.found == [b"ab"]
    assert rig.decider.asked == []


def test_ports_are_answered_by_their_devices_repetitions_included(rig: Rig) -> None:
    loop = rig.script([PortWrite(0x10, 2, b"\1\0\2\0"), PortRead(0x10, 1, 3, 0), PortRead(0x99, 2, 1, 0)])

    loop.run()

    assert rig.reports.kept == [1, 2]
    assert rig.vcpu.found == [bytes(3), b"\xff\xff"]


@pytest.mark.parametrize(
    ("exit_", "reason"),
    [(Shutdown(), StopReason.TRIPLE_FAULT), (Broken("entry failed: 0x21"), StopReason.BROKEN)],
)
def test_what_no_vmm_can_go_on_from_stops(rig: Rig, exit_: Exit, reason: StopReason) -> None:
    assert rig.script([exit_]).run().reason is reason


# ------------------------------------------------ locked instructions


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
    rig.memory.map(GfnRange(GFN, GFN + 1), UaddrRange(rig.uaddrs.start, rig.uaddrs.start + 1), Access(7))
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


def test_a_host_fault_whose_slot_was_taken_away_runs_again_as_an_access(rig: Rig) -> None:
    loop = rig.script([HostFault(GPA), MmioRead(GPA, 1)], [Answer.UNBACKED, Answer.UNBACKED])

    assert loop.run().reason is StopReason.HALTED
    assert rig.vcpu.found == [b"\xff"]


def test_a_host_fault_without_a_gpa_looks_at_the_instruction(rig: Rig) -> None:
    loop = rig.script([HostFault(None)], [Answer.MAPPED], {0: GPA, 14: GPA + 14})

    assert loop.run().reason is StopReason.HALTED
    assert rig.wanted() == [(GFN, Access.EXECUTE)]
