"""Real guests on a real daemon: what they write arrives, and what they touch twice exits once."""

from __future__ import annotations

import struct
from functools import partial

import pytest

from fakes.eventually import PATIENCE, eventually
from fakes.small_vmms import FLOATING, OURS, StartVmm, mmio_exits, run
from intercept_client import memory
from intercept_client.kvm import Coverage, PartitionSetting, StopReason
from intercept_protocol.addresses import PAGE_SHIFT, PAGE_SIZE, GfnRange, UaddrRange
from intercept_protocol.messages import MmioGranularity, RequestedKind
from intercept_protocol.outcomes import Access, Answer
from interceptctl.guest.programs import COPY, COUNT, JUMP, PATTERN, STORE, SWEEP, TRIPLE_FAULT, WATCH, Program
from interceptctl.guest.small_vmm import Bar, SmallVmm
from interceptctl.guest.vmm import SCRATCH_GPA

MIB = 256
"""Pages."""
ELSEWHERE = 0x800
"""A gfn where no test puts anything else."""


@pytest.mark.parametrize("coverage", Coverage)
@pytest.mark.parametrize(
    ("granularity", "intercepts"), [(MmioGranularity.VMA, 1), (MmioGranularity.PAGE, MIB)]
)
def test_a_sweep_of_a_bar_takes_one_intercept_a_vma_or_one_a_page(
    start_vmm: StartVmm, coverage: Coverage, granularity: MmioGranularity, intercepts: int
) -> None:
    vmm = start_vmm(PartitionSetting(mmio_granularity=granularity, coverage=coverage))
    bar = vmm.add_bar(MIB)
    guest = vmm.add_vcpu(SWEEP, esi=bar.gpa, ecx=MIB, ebx=1)

    with mmio_exits(guest) as exits:
        stop = run(guest)

    assert stop.reason is StopReason.HALTED
    assert exits == [intercepts]
    assert guest.tally.intercepts == {Answer.MAPPED: intercepts + 1}, "and one for the program itself"
    assert [bar.word(page * PAGE_SIZE) for page in range(MIB)] == [1] * MIB


def test_a_second_sweep_takes_no_exit_by_kvms_own_count(vmm: SmallVmm) -> None:
    bar = vmm.add_bar(MIB)
    guest = vmm.add_vcpu(SWEEP, esi=bar.gpa, ecx=MIB, ebx=1)
    run(guest)
    vmm.restart(guest, esi=bar.gpa, ecx=MIB, ebx=20)

    with mmio_exits(guest) as exits:
        stop = run(guest)

    assert stop.reason is StopReason.HALTED
    assert exits == [0]
    assert bar.word(PAGE_SIZE) == 21


def test_increments_of_two_vcpus_arrive_exactly(vmm: SmallVmm) -> None:
    bar = vmm.add_bar(1)
    times = 2000
    for _ in range(2):
        vmm.add_vcpu(COUNT, esi=bar.gpa, ecx=times)

    stops = [running.result(PATIENCE) for running in vmm.start()]

    assert [stop.reason for stop in stops] == [StopReason.HALTED] * 2
    assert bar.word(0) == 2 * times


def test_increments_are_exact_while_the_host_keeps_revoking_the_page(vmm: SmallVmm) -> None:
    bar = vmm.add_bar(1)
    times = 20_000
    for _ in range(2):
        vmm.add_vcpu(COUNT, esi=bar.gpa, ecx=times)
    running = vmm.start()

    for count in range(50):
        eventually(partial(_has_counted, bar, 100 * count), True)
        with vmm.partition.notifier.invalidation(bar.uaddrs):
            pass

    assert [vcpu.result(PATIENCE).reason for vcpu in running] == [StopReason.HALTED] * 2
    assert bar.word(0) == 2 * times


def _has_counted(bar: Bar, seen: int) -> bool:
    return bar.word(0) >= seen


@pytest.mark.parametrize("coverage", Coverage)
def test_writes_of_every_width_arrive_page_boundaries_included(
    start_vmm: StartVmm, coverage: Coverage
) -> None:
    vmm = start_vmm(PartitionSetting(coverage=coverage, mmio_granularity=MmioGranularity.PAGE))
    pages = 4
    bar = vmm.add_bar(pages)
    guest = vmm.add_vcpu(PATTERN, esi=bar.gpa, edx=bar.gpa + pages * PAGE_SIZE)

    stop = run(guest)

    assert stop.reason is StopReason.HALTED
    assert bar.read(0, pages * PAGE_SIZE) == _pattern(bar.gpa, pages)


def _pattern(gpa: int, pages: int) -> bytes:
    """What PATTERN leaves."""
    memory = bytearray().join(struct.pack("<I", gpa + offset) for offset in range(0, pages * PAGE_SIZE, 4))
    memory[1:4] = b"\x11\x22\x22"
    memory[4094:4098] = b"ABCD"
    memory[8188:8196] = memory[8:16]
    return bytes(memory)


@pytest.mark.parametrize("offset", [0, PAGE_SIZE - 3], ids=["within a page", "across pages"])
def test_eight_bytes_go_through_first_touches_on_both_ends(vmm: SmallVmm, offset: int) -> None:
    source, target = vmm.add_bar(2), vmm.add_bar(2, at=ELSEWHERE)
    source.write(offset, b"12345678")
    guest = vmm.add_vcpu(COPY, esi=source.gpa + offset, edi=target.gpa + offset)

    run(guest)

    assert target.read(offset, 8) == b"12345678"


def test_an_access_that_straddles_two_bars_reaches_both(vmm: SmallVmm) -> None:
    low, high = vmm.add_bar(1, at=ELSEWHERE), vmm.add_bar(1, at=ELSEWHERE + 1)
    guest = vmm.add_vcpu(STORE, esi=high.gpa - 2, ebx=0x44434241)

    run(guest)

    assert (low.read(PAGE_SIZE - 2, 2), high.read(0, 2)) == (b"AB", b"CD")
    assert vmm.reports.kept == [0x44434241]


def test_a_device_of_the_vmms_own_is_answered_without_an_intercept(vmm: SmallVmm) -> None:
    guest = vmm.add_vcpu(STORE, esi=SCRATCH_GPA + 8, ebx=0x12345678)

    stop = run(guest)

    assert stop.reason is StopReason.HALTED
    assert vmm.reports.kept == [0x12345678]
    assert vmm.scratch.accesses == 2
    assert guest.tally.intercepts == {Answer.MAPPED: 1}, "the program itself"


def test_a_forwarded_access_without_a_device_reads_all_ones(vmm: SmallVmm) -> None:
    guest = vmm.add_vcpu(STORE, esi=ELSEWHERE << PAGE_SHIFT, ebx=1)

    run(guest)

    assert vmm.reports.kept == [FLOATING]
    assert guest.tally.intercepts[Answer.NO_REGION] == 2


def test_a_write_to_a_read_only_region_is_forwarded_and_leaves_it_as_it_was(vmm: SmallVmm) -> None:
    rom = vmm.add_bar(1, writable=False)
    rom.write(0, OURS.to_bytes(4, "little"))
    guest = vmm.add_vcpu(STORE, esi=rom.gpa, ebx=1)
    run(guest)
    vmm.restart(guest, esi=rom.gpa, ebx=2)

    with mmio_exits(guest) as exits:
        stop = run(guest)

    assert stop.reason is StopReason.HALTED
    assert vmm.reports.kept == [OURS, OURS]
    assert exits == [1], "the write; the read goes through the read-only memslot"
    assert guest.tally.intercepts[Answer.PERMISSION] == 2
    assert rom.word(0) == OURS


def test_a_jump_into_the_void_stops_the_vcpu_with_the_place(vmm: SmallVmm) -> None:
    guest = vmm.add_vcpu(JUMP, esi=ELSEWHERE << PAGE_SHIFT)

    stop = run(guest)

    assert (stop.reason, stop.gpa, stop.answer) == (
        StopReason.NOT_EXECUTABLE,
        ELSEWHERE << PAGE_SHIFT,
        Answer.NO_REGION,
    )


def test_a_jump_into_a_bar_that_is_not_executable_stops_the_vcpu(vmm: SmallVmm) -> None:
    bar = vmm.add_bar(1)
    guest = vmm.add_vcpu(JUMP, esi=bar.gpa)

    stop = run(guest)

    assert (stop.reason, stop.answer) == (StopReason.NOT_EXECUTABLE, Answer.PERMISSION)


def test_a_triple_fault_stops_the_vcpu_and_no_other(vmm: SmallVmm) -> None:
    bar = vmm.add_bar(1)
    vmm.add_vcpu(TRIPLE_FAULT)
    vmm.add_vcpu(WATCH, esi=bar.gpa)

    faulting, watching = vmm.start()

    assert faulting.result(PATIENCE).reason is StopReason.TRIPLE_FAULT
    vmm.reports.wait(10)
    assert not watching.done()


def test_an_instruction_that_kvm_does_not_know_stops_the_vcpu_instead_of_spinning(vmm: SmallVmm) -> None:
    unknown = Program("unknown", "", "", b"\x0f\x3f")
    guest = vmm.add_vcpu(unknown)

    stop = run(guest)

    assert stop.reason in {StopReason.NOT_EMULATED, StopReason.TRIPLE_FAULT}
    assert guest.tally.exits["NotEmulated"] <= 3


def test_an_instruction_across_pages_is_fetched_from_both(start_vmm: StartVmm) -> None:
    vmm = start_vmm(PartitionSetting(mmio_granularity=MmioGranularity.PAGE))
    code = vmm.add_bar(2, executable=True)
    code.write(PAGE_SIZE - 2, b"\xbb\x01\x02\x03\x04\xf4")  # mov ebx, 0x04030201; hlt
    guest = vmm.add_vcpu(JUMP, esi=code.gpa + PAGE_SIZE - 2)

    stop = run(guest)

    assert stop.reason is StopReason.HALTED
    assert guest.vcpu.registers[1] == 0x04030201


def test_a_bar_moved_while_the_guest_runs_is_seen_at_the_new_place_and_not_at_the_old(vmm: SmallVmm) -> None:
    bar = vmm.add_bar(1)
    bar.write(0, OURS.to_bytes(4, "little"))
    vmm.add_vcpu(WATCH, esi=bar.gpa)
    moved = GfnRange(start=ELSEWHERE, end=ELSEWHERE + 1)
    (watching,) = vmm.start()
    vmm.reports.wait_for(OURS)

    vmm.partition.remove_region(bar.gfns, bar.uaddrs)
    vmm.partition.add_region(moved, bar.uaddrs, RequestedKind.MMIO, writable=True, executable=False)
    seen_after = vmm.reports.wait(20)[1:]  # the first may have been on its way

    assert set(seen_after) == {FLOATING}
    reader = vmm.add_vcpu(STORE, esi=moved.start << PAGE_SHIFT, ebx=7)
    run(reader)
    assert bar.word(0) == 7
    assert not watching.done()


def test_a_guest_that_reads_while_the_host_unmaps_floats_and_finds_it_again(vmm: SmallVmm) -> None:
    bar = vmm.add_bar(2)
    bar.write(0, OURS.to_bytes(4, "little"))
    vmm.add_vcpu(WATCH, esi=bar.gpa)
    vmm.start()
    vmm.reports.wait_for(OURS)

    memory.munmap(vmm.partition.notifier, bar.uaddrs)
    while_gone = vmm.reports.wait(20)[1:]
    memory.map_fixed(
        vmm.partition.notifier,
        bar.uaddrs,
        Access.READ,
        memory.Sharing.SHARED,
        file=bar.file,
    )

    assert set(while_gone) == {FLOATING}
    vmm.reports.wait_for(OURS)


def test_unmapping_one_page_leaves_the_others_without_an_intercept(vmm: SmallVmm) -> None:
    bar = vmm.add_bar(MIB)
    guest = vmm.add_vcpu(SWEEP, esi=bar.gpa, ecx=MIB, ebx=1)
    run(guest)
    hole = UaddrRange(start=bar.uaddrs.start + 100, end=bar.uaddrs.start + 101)
    memory.munmap(vmm.partition.notifier, hole)
    vmm.restart(guest, esi=bar.gpa, ecx=MIB, ebx=1)

    with mmio_exits(guest) as exits:
        run(guest)

    assert exits == [2], "a read and a write of the hole"
    assert guest.tally.intercepts[Answer.UNBACKED] == 2
    assert [bar.word(page * PAGE_SIZE) for page in (99, 100, 101)] == [2, 1, 2]
