"""Real guests that touch far more windows than KVM has memslots."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from typing import Final

import pytest

from fakes.daemon_process import DaemonProcess
from fakes.eventually import PATIENCE, eventually
from fakes.small_vmms import mmio_exits, run
from intercept_client import memory
from intercept_client.kvm import Machine, PartitionSetting, Register, StopReason
from intercept_protocol.addresses import PAGE_SIZE, UaddrRange
from intercept_protocol.messages import MmioGranularity
from intercept_protocol.outcomes import Answer
from interceptctl.guest.programs import COUNT, SWEEP
from interceptctl.guest.small_vmm import Bar, SmallVmm

SLOTS: Final = 8
WINDOWS: Final = 64
"""Pages, each mapped by a separate intercept."""
ENDLESS: Final = 0xFFFF_FFFF


class FewSlots(Machine):
    def __init__(self, kvm: int) -> None:
        super().__init__(kvm)
        self.slot_limit = SLOTS


@pytest.fixture
def vmm(daemon: DaemonProcess) -> Iterator[SmallVmm]:
    setting = PartitionSetting(mmio_granularity=MmioGranularity.PAGE)
    with SmallVmm(daemon.socket, setting, open_machine=FewSlots.open) as vmm:
        yield vmm


def words(bar: Bar) -> list[int]:
    """The first of each page."""
    return [bar.word(page * PAGE_SIZE) for page in range(bar.gfns.page_count)]


def test_a_guest_reaches_more_windows_than_the_vm_has_memslots(vmm: SmallVmm) -> None:
    bar = vmm.add_bar(WINDOWS)
    guest = vmm.add_vcpu(SWEEP, esi=bar.gpa, ecx=WINDOWS, ebx=2)

    with mmio_exits(guest) as exits:
        stop = run(guest)

    assert stop.reason is StopReason.HALTED
    assert words(bar) == [2] * WINDOWS
    assert exits == [WINDOWS], "one for each first touch, none for what was merged"
    assert guest.tally.intercepts == {Answer.MAPPED: WINDOWS + 1}
    assert len(vmm.partition.memory.slots) <= SLOTS


def test_unmapping_the_middle_of_a_merged_slot_keeps_the_rest(vmm: SmallVmm) -> None:
    bar = vmm.add_bar(WINDOWS)
    guest = vmm.add_vcpu(SWEEP, esi=bar.gpa, ecx=WINDOWS, ebx=1)
    run(guest)
    hole = UaddrRange(start=bar.uaddrs.start + 10, end=bar.uaddrs.start + 11)
    memory.munmap(vmm.partition.notifier, hole)
    vmm.restart(guest, esi=bar.gpa, ecx=WINDOWS, ebx=1)

    with mmio_exits(guest) as exits:
        run(guest)

    assert exits == [2], "a read and a write of the hole"
    assert guest.tally.intercepts[Answer.UNBACKED] == 2
    assert words(bar) == [2] * 10 + [1] + [2] * (WINDOWS - 11)


def test_a_vcpu_that_runs_while_its_page_is_merged_loses_no_access_and_never_exits(vmm: SmallVmm) -> None:
    bar = vmm.add_bar(WINDOWS)
    counting = vmm.add_vcpu(COUNT, esi=bar.gpa + 8, ecx=ENDLESS)
    with closing(counting.vcpu.statistics()) as statistics:
        vmm.start()
        eventually(lambda: bar.word(8) > 0, True)
        before = statistics.read("mmio_exits")
        vmm.add_vcpu(SWEEP, esi=bar.gpa, ecx=WINDOWS, ebx=1)

        stop = vmm.start()[1].result(PATIENCE)
        vmm.stop()

        assert stop.reason is StopReason.HALTED
        assert statistics.read("mmio_exits") == before
    assert words(bar) == [1] * WINDOWS
    counted = ENDLESS - counting.vcpu.registers[Register.ECX]
    assert bar.word(8) - counted in {0, 1}, "it may have been stopped before its own count"
