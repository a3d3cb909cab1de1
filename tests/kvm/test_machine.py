"""KVM itself, through our hands: slots, statistics, kicks, and the hazard that all this is about."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest

from fakes.eventually import PATIENCE, eventually
from fakes.kvm_ports import ScriptedDecider
from fakes.small_vmms import STRANGERS, map_stranger
from intercept_client import libc
from intercept_client.kvm import Bus, GuestVcpu, KvmUnavailable, Machine, StartState, StopReason
from intercept_client.kvm._copying import DirectCopier
from intercept_client.kvm._exits import Halted, Interrupted, MmioRead, MmioWrite, NotEmulated, PortWrite
from intercept_client.kvm._guest_memory import GuestMemory
from intercept_client.kvm._machine import require_api_version
from intercept_client.kvm._memslots import Memslot
from intercept_client.kvm._registers import Register
from intercept_client.kvm._vcpu import Vcpu
from intercept_client.libc import Sharing
from intercept_protocol.addresses import PAGE_SHIFT, GfnRange, UaddrRange
from intercept_protocol.errors import WireError
from intercept_protocol.outcomes import Access, Answer
from interceptctl.guest.programs import COUNT, JUMP, WATCH, Program

RW = Access.READ | Access.WRITE
CODE, BAR = GfnRange(start=0, end=1), GfnRange(start=0x200, end=0x204)
BAR_GPA = BAR.start << PAGE_SHIFT


class Bench:
    """A vCPU with a page of code, and a BAR of four pages behind which there is memory, mapped or not."""

    def __init__(self, machine: Machine) -> None:
        self.memory = GuestMemory(machine)
        self.code = libc.mmap(UaddrRange.of_pages(0, 1), RW, Sharing.PRIVATE)
        self.bar = libc.mmap(UaddrRange.of_pages(0, BAR.page_count), RW, Sharing.PRIVATE)
        self.memory.map(CODE, self.code, RW)
        self.vcpu = machine.create_vcpu(0)

    def load(self, program: Program, **registers: int) -> Vcpu:
        ctypes.memmove(self.code.start_uaddr, program.code, len(program.code))
        named = tuple((Register[name.upper()], value) for name, value in registers.items())
        self.vcpu.start_at(StartState(0, named))
        return self.vcpu

    def map_bar(self) -> None:
        self.memory.map(BAR, self.bar, RW)

    def word(self) -> int:
        """The BAR's first."""
        return int.from_bytes(ctypes.string_at(self.bar.start_uaddr, 4), "little")

    def wait_counting(self) -> None:
        """Until a guest has counted that word up."""
        before = self.word()
        eventually(lambda: self.word() > before, True)

    def close(self) -> None:
        self.memory.unmap(GfnRange(start=0, end=1 << 20))
        libc.munmap(self.code)
        libc.munmap(self.bar)


@pytest.fixture
def bench(machine: Machine) -> Iterator[Bench]:
    with closing(Bench(machine)) as bench:
        yield bench


def test_a_machine_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(KvmUnavailable, match="no KVM on this machine"):
        Machine.open(str(tmp_path / "kvm"))


def test_a_device_other_than_kvm_gives_no_vm() -> None:
    with pytest.raises(KvmUnavailable, match="/dev/null gives no VM"):
        Machine.open("/dev/null")


def test_another_api_version_is_refused() -> None:
    with pytest.raises(KvmUnavailable, match="version 13"):
        require_api_version(13)


def test_a_guest_without_any_memslot_runs(machine: Machine) -> None:
    vcpu = machine.create_vcpu(0)
    vcpu.start_at(StartState(0x1000))

    assert vcpu.run() == NotEmulated()


def test_an_access_exits_until_it_has_a_slot(bench: Bench) -> None:
    vcpu = bench.load(WATCH, esi=BAR_GPA)

    assert vcpu.run() == MmioRead(BAR_GPA, 4)
    vcpu.finish_read(b"\x2a\0\0\0")
    bench.map_bar()

    assert vcpu.run() == PortWrite(0x10, 4, b"\x2a\0\0\0"), "what the exit was answered with"
    assert vcpu.run() == PortWrite(0x10, 4, bytes(4)), "what the memory has"


def test_the_hazard_a_slot_outlives_its_memory_and_shows_a_strangers(bench: Bench) -> None:
    bench.map_bar()
    vcpu = bench.load(WATCH, esi=BAR_GPA)
    assert vcpu.run() == PortWrite(0x10, 4, bytes(4))

    map_stranger(bench.bar)

    assert vcpu.run() == PortWrite(0x10, 4, STRANGERS.to_bytes(4, "little"))


def test_taking_the_slot_away_first_closes_it(bench: Bench) -> None:
    bench.map_bar()
    vcpu = bench.load(WATCH, esi=BAR_GPA)
    assert vcpu.run() == PortWrite(0x10, 4, bytes(4))

    bench.memory.unmap(BAR)
    map_stranger(bench.bar)

    assert vcpu.run() == MmioRead(BAR_GPA, 4)


def test_a_locked_increment_exits_as_a_read_and_a_write_that_is_finished_without_going_on(
    bench: Bench,
) -> None:
    vcpu = bench.load(COUNT, esi=BAR_GPA, ecx=1)

    assert vcpu.run() == MmioRead(BAR_GPA, 4)
    vcpu.finish_read(b"\x07\0\0\0")
    assert vcpu.finish() == MmioWrite(BAR_GPA, b"\x08\0\0\0")
    assert vcpu.finish() == Interrupted()
    assert vcpu.registers[Register.ECX] == 1, "the next instruction has not run"
    assert vcpu.run() == Halted()


def test_registers_put_back_after_a_write_run_the_instruction_again_on_the_memory(bench: Bench) -> None:
    """What makes a locked instruction whole whose memory went and came back in its middle."""
    ctypes.memmove(bench.bar.start_uaddr, b"\x07\0\0\0", 4)
    vcpu = bench.load(COUNT, esi=BAR_GPA, ecx=1)
    assert vcpu.run() == MmioRead(BAR_GPA, 4)
    before = vcpu.registers
    vcpu.finish_read(bytes(4))
    assert vcpu.finish() == MmioWrite(BAR_GPA, b"\x01\0\0\0")
    assert vcpu.finish() == Interrupted()
    bench.map_bar()

    vcpu.registers = before

    assert vcpu.run() == Halted()
    assert bench.word() == 8


class Meddling(DirectCopier):
    """Once, between a read and what becomes of it, another vCPU counts up and the host takes the page
    away."""

    def __init__(self, bench: Bench) -> None:
        self._bench = bench
        self._is_due = True

    def read(self, uaddr: int, size: int) -> bytes:
        data = super().read(uaddr, size)
        if self._is_due:
            self._is_due = False
            self.write(uaddr, (int.from_bytes(data, "little") + 1).to_bytes(size, "little"))
            threading.Thread(target=self._bench.memory.unmap, args=(BAR,)).start()
            eventually(lambda: self._bench.memory.reaches(BAR.start, Access.READ), False)
        return data


def test_a_locked_increment_interrupted_by_an_unmap_undoes_no_other(bench: Bench) -> None:
    vcpu = bench.load(COUNT, esi=BAR_GPA, ecx=1)
    guest = GuestVcpu(
        vcpu,
        ScriptedDecider([bench.map_bar, Answer.MAPPED, bench.map_bar, Answer.MAPPED]),
        memory=bench.memory,
        copier=Meddling(bench),
        devices=Bus(),
        ports=Bus(),
        on_lost=pytest.fail,
        kick=lambda _: None,
    )

    stop = guest.start().result(PATIENCE)

    assert stop.reason is StopReason.HALTED
    assert bench.word() == 2
    assert guest.tally.replayed == 1


def test_a_read_only_slot_reads_without_and_writes_with_an_exit(bench: Bench) -> None:
    bench.memory.map(BAR, bench.bar, Access.READ)
    vcpu = bench.load(WATCH, esi=BAR_GPA)
    assert vcpu.run() == PortWrite(0x10, 4, bytes(4))
    bench.load(COUNT, esi=BAR_GPA, ecx=1)

    assert vcpu.run() == MmioWrite(BAR_GPA, b"\x01\0\0\0")


def test_a_jump_to_unmapped_memory_stops_there(bench: Bench) -> None:
    vcpu = bench.load(JUMP, esi=BAR_GPA)

    assert vcpu.run() == NotEmulated()
    assert vcpu.registers[Register.RIP] == vcpu.instruction_gpa() == BAR_GPA


def test_memslots_end_where_kvm_says_and_the_refused_one_changes_nothing(machine: Machine) -> None:
    memory = GuestMemory(machine)
    page = libc.mmap(UaddrRange.of_pages(0, 1), RW, Sharing.PRIVATE)
    machine.slot_limit = 40
    limited = GuestMemory(machine)
    for index in range(35):
        limited.map(GfnRange(start=2 * index, end=2 * index + 1), page, RW)

    with pytest.raises(WireError, match="ENOSPC"):
        limited.map(GfnRange(start=0x1000, end=0x1001), page, RW)

    assert len(limited.slots) == 35, "an eighth is kept for unmaps"
    assert memory.slots == []
    libc.munmap(page)


def test_a_slot_beyond_kvms_last_is_refused_by_kvm(machine: Machine) -> None:
    page = libc.mmap(UaddrRange.of_pages(0, 1), RW, Sharing.PRIVATE)
    beyond = Memslot(machine.slot_limit, GfnRange(start=0, end=1), page, RW)

    with pytest.raises(OSError, match="Invalid argument"):
        machine.set_memslot(beyond)

    libc.munmap(page)


def test_kvms_own_statistics_count_mmio_exits(bench: Bench) -> None:
    vcpu = bench.load(WATCH, esi=BAR_GPA)
    with closing(vcpu.statistics()) as statistics:
        before = statistics.read("mmio_exits")
        vcpu.run()

        assert statistics.read("mmio_exits") == before + 1


def test_a_kick_brings_a_vcpu_back_from_the_guest_and_before_it_entered(bench: Bench) -> None:
    spinning = Program("spin", "", "", b"\xeb\xfe")
    vcpu = bench.load(spinning)
    inside = threading.Event()

    def run() -> list[object]:
        with vcpu.on_this_thread():
            inside.set()
            return [vcpu.run(), vcpu.run()]

    vcpu.kick()
    with ThreadPoolExecutor(1) as threads:
        running = threads.submit(run)
        assert inside.wait(PATIENCE)
        while not running.done():
            vcpu.kick()

        assert running.result() == [Interrupted(), Interrupted()]


def test_the_rest_of_a_slot_that_is_split_never_exits(bench: Bench) -> None:
    """KVM deletes and creates; the gate keeps the vCPU from seeing it."""
    bench.map_bar()
    vcpu = bench.load(COUNT, esi=BAR_GPA, ecx=0xFFFFFFFF)
    last = GfnRange(start=BAR.end - 1, end=BAR.end)
    exits: list[object] = []
    done = threading.Event()

    def run() -> None:
        with vcpu.on_this_thread():
            while not done.is_set():
                bench.memory.gate.enter(vcpu)
                exits.append(vcpu.run())
                bench.memory.gate.leave(vcpu)

    with closing(vcpu.statistics()) as statistics, ThreadPoolExecutor(1) as threads:
        running = threads.submit(run)
        for _ in range(50):
            bench.wait_counting()
            bench.memory.unmap(last)
            bench.map_bar()
        done.set()
        vcpu.kick()
        running.result(PATIENCE)

        assert statistics.read("mmio_exits") == 0
    assert set(exits) == {Interrupted()}
