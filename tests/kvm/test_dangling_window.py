"""The dangling window: memory that is unmapped and then reused at the same address, with a
guest's memslot over it. Without the daemon's notifier it is open; announced it never opens; watched it closes
soon.
"""

from __future__ import annotations

import time

from fakes.eventually import PATIENCE, eventually
from fakes.small_vmms import FLOATING, OURS, STRANGERS, StartVmm, has_only, map_stranger, run
from intercept_client import libc
from intercept_client.kvm import Coverage, GuestVcpu, PartitionSetting, StopReason
from intercept_protocol.outcomes import Access, Answer
from interceptctl.guest.programs import STORE, WATCH
from interceptctl.guest.small_vmm import Bar, SmallVmm

WATCHED = PartitionSetting(coverage=Coverage.WATCHED)
READS = 40


def touched_bar(vmm: SmallVmm) -> tuple[Bar, GuestVcpu]:
    """A BAR that a running guest reads from."""
    bar = vmm.add_bar(1)
    bar.write(0, OURS.to_bytes(4, "little"))
    guest = vmm.add_vcpu(WATCH, esi=bar.gpa)
    vmm.start()
    vmm.reports.wait_for(OURS)
    return bar, guest


def test_without_a_notifier_the_guest_reads_a_strangers_memory(vmm: SmallVmm) -> None:
    """The hazard, on the announced setting with the announcement left out."""
    bar, _ = touched_bar(vmm)

    map_stranger(bar.uaddrs)

    vmm.reports.wait_for(STRANGERS)


def test_announced_the_guest_never_reads_a_strangers_memory_and_is_forwarded(vmm: SmallVmm) -> None:
    bar, guest = touched_bar(vmm)

    with vmm.partition.notifier.invalidation(bar.uaddrs):
        vmm.partition.remove_region(bar.gfns, bar.uaddrs)
        map_stranger(bar.uaddrs)
    seen = vmm.reports.wait(READS)

    assert set(seen) <= {OURS, FLOATING}, "what was read before may still have been on its way"
    assert set(seen[1:]) == {FLOATING}
    assert guest.tally.intercepts[Answer.NO_REGION] >= READS - 1


def test_announced_a_write_never_reaches_a_strangers_memory(vmm: SmallVmm) -> None:
    bar = vmm.add_bar(1)
    guest = vmm.add_vcpu(STORE, esi=bar.gpa, ebx=1)
    run(guest)
    with vmm.partition.notifier.invalidation(bar.uaddrs):
        vmm.partition.remove_region(bar.gfns, bar.uaddrs)
        stranger = map_stranger(bar.uaddrs)
    vmm.restart(guest, esi=bar.gpa, ebx=2)

    stop = run(guest)

    assert stop.reason is StopReason.HALTED
    assert has_only(stranger, STRANGERS & 0xFF)
    assert vmm.reports.kept == [1, FLOATING]


def test_watched_the_guest_is_cut_off_after_the_unmap_and_forwarded(start_vmm: StartVmm) -> None:
    vmm = start_vmm(WATCHED)
    bar, guest = touched_bar(vmm)

    libc.munmap(bar.uaddrs)

    vmm.reports.wait_for(FLOATING)
    eventually(lambda: guest.tally.intercepts[Answer.UNBACKED] > 0, True)


def test_watched_a_strangers_memory_is_out_of_reach_within_a_bounded_time(start_vmm: StartVmm) -> None:
    """The event comes after the fact: the guest may read the stranger's memory until the memslot is gone."""
    vmm = start_vmm(WATCHED)
    bar = vmm.add_bar(1)
    guest = vmm.add_vcpu(STORE, esi=bar.gpa, ebx=1)
    run(guest)

    stranger = map_stranger(bar.uaddrs)
    began = time.perf_counter()
    eventually(lambda: vmm.partition.memory.reaches(bar.gfns.start, Access.READ), False, PATIENCE)
    print(f"\nthe window was open for {(time.perf_counter() - began) * 1e3:.2f} ms after the call returned")
    vmm.partition.remove_region(bar.gfns, bar.uaddrs)
    vmm.restart(guest, esi=bar.gpa, ebx=2)
    run(guest)

    assert has_only(stranger, STRANGERS & 0xFF)
    assert vmm.reports.kept == [1, FLOATING]
