"""Guests that touch memory that faults. They stop with HOST_FAULT, and their VMM lives on."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest

from fakes.locked_memory import lock
from fakes.small_vmms import StartVmm, run
from fakes.vcpu_rig import GPA, RW, Rig
from intercept_client import libc
from intercept_client.kvm import Coverage, PartitionSetting, StopReason
from intercept_client.kvm._exits import HostFault, MmioRead, MmioWrite, NotEmulated
from intercept_client.kvm._stop import Stop
from intercept_protocol.addresses import PAGE_SIZE
from intercept_protocol.outcomes import Access, Answer
from interceptctl.guest.programs import COUNT, JUMP, STORE, Program
from interceptctl.guest.small_vmm import Bar, SmallVmm

MADV_GUARD_INSTALL, MADV_GUARD_REMOVE = 102, 103
"""Linux 6.13."""
HLT = b"\xf4"

Change = Callable[[Bar], None]


def cut_off(bar: Bar) -> None:
    os.ftruncate(bar.file, 0)


def give_back(bar: Bar) -> None:
    os.ftruncate(bar.file, bar.uaddrs.length)


def guard(bar: Bar) -> None:
    try:
        libc.madvise(bar.uaddrs, MADV_GUARD_INSTALL)
    except OSError as refusal:
        pytest.skip(f"no guard pages on this kernel: {refusal}")


def unguard(bar: Bar) -> None:
    libc.madvise(bar.uaddrs, MADV_GUARD_REMOVE)


def protect(bar: Bar) -> None:
    libc.mprotect(bar.uaddrs, Access.NONE)


def lock_and_protect(bar: Bar) -> None:
    lock(bar.uaddrs)
    libc.mprotect(bar.uaddrs, Access.NONE)


def unmap(bar: Bar) -> None:
    libc.munmap(bar.uaddrs)


def announced(vmm: SmallVmm, bar: Bar, change: Change) -> None:
    with vmm.partition.notifier.invalidation(bar.uaddrs):
        change(bar)


@pytest.mark.parametrize("program", [STORE, COUNT], ids=["store", "locked"])
@pytest.mark.parametrize("touched", [False, True], ids=["at first touch", "after it was mapped"])
@pytest.mark.parametrize(("spoil", "repair"), [(cut_off, give_back), (guard, unguard)], ids=["file", "guard"])
def test_a_guest_stops_at_a_host_fault_and_continues_once_it_is_repaired(
    vmm: SmallVmm, spoil: Change, repair: Change, touched: bool, program: Program
) -> None:
    bar = vmm.add_bar(4)
    guest = vmm.add_vcpu(program, esi=bar.gpa, ecx=1)
    if touched:
        run(guest)
    announced(vmm, bar, spoil)
    vmm.restart(guest, esi=bar.gpa, ebx=7, ecx=7)

    stop = run(guest)

    assert (stop.reason, stop.gpa) == (StopReason.HOST_FAULT, bar.gpa)
    announced(vmm, bar, repair)
    bar.write(0, bytes(4))
    assert run(guest).reason is StopReason.HALTED
    assert bar.word(0) == 7


@pytest.mark.parametrize(
    ("coverage", "change"),
    [
        *((Coverage.ANNOUNCED, change) for change in (cut_off, guard, protect, lock_and_protect, unmap)),
        *((Coverage.WATCHED, change) for change in (cut_off, guard, protect)),
    ],
)
def test_a_guest_stops_at_memory_changed_without_announcement(
    start_vmm: StartVmm, coverage: Coverage, change: Change
) -> None:
    vmm = start_vmm(PartitionSetting(coverage=coverage))
    bar = vmm.add_bar(1)
    guest = vmm.add_vcpu(STORE, esi=bar.gpa, ebx=7)
    run(guest)
    change(bar)
    vmm.restart(guest, esi=bar.gpa, ebx=7)

    assert run(guest).reason is StopReason.HOST_FAULT


@pytest.mark.parametrize(
    ("offset", "left"), [(0, 0), (PAGE_SIZE - 2, PAGE_SIZE)], ids=["within a page", "across pages"]
)
def test_a_guest_that_runs_code_that_faults_stops(vmm: SmallVmm, offset: int, left: int) -> None:
    code = vmm.add_bar(2, executable=True)
    code.write(offset, b"\xbb\x01\x02\x03\x04" + HLT)  # mov ebx, 0x04030201; hlt
    guest = vmm.add_vcpu(JUMP, esi=code.gpa + offset)
    assert run(guest).reason is StopReason.HALTED
    with vmm.partition.notifier.invalidation(code.uaddrs):
        os.ftruncate(code.file, left)
    vmm.restart(guest, esi=code.gpa + offset)

    stop = run(guest)

    assert (stop.reason, stop.gpa) == (StopReason.HOST_FAULT, code.gpa + offset)


# ------------------------------------------------ by script


@pytest.fixture
def faulting(rig: Rig) -> Rig:
    """Mapped for the guest, and not there."""
    rig.map(RW | Access.EXECUTE)
    libc.mprotect(rig.uaddrs, Access.NONE)
    return rig


@pytest.mark.parametrize("exit_", [MmioRead(GPA, 4), MmioWrite(GPA, b"\x11")])
def test_a_daemon_that_insists_on_faulting_memory_ends_in_a_host_fault(
    faulting: Rig, exit_: MmioRead | MmioWrite
) -> None:
    loop = faulting.script([exit_], [Answer.ALREADY_MAPPED, Answer.NO_PROGRESS])

    stop = loop.run()

    detail = f"uaddr {faulting.uaddrs.start_uaddr:#x} faults"
    assert stop == Stop(StopReason.HOST_FAULT, GPA, Answer.NO_PROGRESS, detail)


def test_another_failure_after_a_fault_keeps_its_reason(faulting: Rig) -> None:
    loop = faulting.script([MmioRead(GPA, 4)], [Answer.HYPERVISOR_ERROR])

    assert loop.run() == Stop(StopReason.FAILED, GPA, Answer.HYPERVISOR_ERROR)


def test_a_fault_in_kvm_that_the_daemon_denies_is_a_host_fault(rig: Rig) -> None:
    rig.map()
    loop = rig.script([HostFault(GPA), HostFault(GPA)], [Answer.ALREADY_MAPPED, Answer.NO_PROGRESS])

    assert loop.run() == Stop(StopReason.HOST_FAULT, GPA, Answer.NO_PROGRESS, "KVM_RUN: EFAULT")


@pytest.mark.parametrize("readable", [0, 2], ids=["none of it", "a part of it"])
def test_an_instruction_whose_bytes_fault_is_a_host_fault(rig: Rig, readable: int) -> None:
    rig.map(RW | Access.EXECUTE)
    rig.code = bytes(readable)
    loop = rig.script([NotEmulated(), NotEmulated()], [], {0: GPA, 14: GPA + 14})

    assert loop.run() == Stop(StopReason.HOST_FAULT, GPA)


def test_a_truncated_instruction_at_the_end_of_mapped_memory_is_a_host_fault(rig: Rig) -> None:
    rig.map(RW | Access.EXECUTE)
    rig.code = bytes(2)
    loop = rig.script([NotEmulated(), NotEmulated()], [], {0: GPA + PAGE_SIZE - 2})

    assert loop.run() == Stop(StopReason.NOT_EMULATED, GPA + PAGE_SIZE - 2)
