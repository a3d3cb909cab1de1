"""What a first touch costs, what later accesses cost, and how long the watched window is; printed, not
judged."""

from __future__ import annotations

import time
from statistics import median, quantiles

import pytest

from fakes.small_vmms import StartVmm, map_stranger, run
from intercept_client.kvm import Coverage, PartitionSetting
from intercept_protocol.addresses import GfnRange
from intercept_protocol.messages import MmioGranularity
from intercept_protocol.outcomes import Access
from interceptctl.guest.programs import STORE, SWEEP
from interceptctl.guest.small_vmm import BAR_GFN, READ_WRITE, SCRATCH_GPA

pytestmark = pytest.mark.verify
PAGES, ROUNDS, WINDOWS = 1024, 50, 50


def say(what: str, seconds: list[float]) -> None:
    p99 = quantiles(seconds, n=100)[98]
    print(f"\n{what}: median {median(seconds) * 1e6:,.1f} us, p99 {p99 * 1e6:,.1f} us of {len(seconds)}")


def test_first_touch_and_later_accesses(start_vmm: StartVmm) -> None:
    vmm = start_vmm(PartitionSetting(mmio_granularity=MmioGranularity.PAGE))
    bar = vmm.add_bar(PAGES)
    guest = vmm.add_vcpu(SWEEP, esi=bar.gpa, ecx=PAGES, ebx=1)
    run(guest)
    say("first touch, exit to being ready to run again", guest.tally.first_touches)
    vmm.restart(guest, esi=bar.gpa, ecx=PAGES, ebx=ROUNDS)
    run(guest)  # KVM fills its own tables
    vmm.restart(guest, esi=bar.gpa, ecx=PAGES, ebx=ROUNDS)

    began = time.perf_counter()
    run(guest)

    later = (time.perf_counter() - began) / (PAGES * ROUNDS)
    print(f"a later access, loop and all: {later * 1e6:.2f} us")
    assert bar.word(0) == 2 * ROUNDS + 1


def test_an_access_to_the_vmms_own_device(start_vmm: StartVmm) -> None:
    vmm = start_vmm()
    guest = vmm.add_vcpu(SWEEP, esi=SCRATCH_GPA, ecx=1, ebx=2000)

    began = time.perf_counter()
    run(guest)

    accesses = vmm.scratch.accesses
    each = (time.perf_counter() - began) / accesses
    print(f"\nan emulated access, a report for every two: {each * 1e6:.1f} us")
    assert accesses == 4000


def test_a_memslot_comes_and_goes(start_vmm: StartVmm) -> None:
    vmm = start_vmm()
    bar = vmm.add_bar(1)
    gfns = GfnRange(start=BAR_GFN, end=BAR_GFN + 1)
    come, go = [], []
    for _ in range(500):
        began = time.perf_counter()
        vmm.partition.memory.map(gfns, bar.uaddrs, READ_WRITE)
        there = time.perf_counter()
        vmm.partition.memory.unmap(gfns)
        come.append(there - began)
        go.append(time.perf_counter() - there)
    say("a memslot comes", come)
    say("a memslot goes", go)
    assert vmm.partition.memory.slots == []


def test_the_watched_window(start_vmm: StartVmm) -> None:
    vmm = start_vmm(PartitionSetting(coverage=Coverage.WATCHED))
    bar = vmm.add_bar(1)
    guest = vmm.add_vcpu(STORE, esi=bar.gpa, ebx=1)
    windows = []
    for _ in range(WINDOWS):
        run(guest)
        map_stranger(bar.uaddrs)
        began = time.perf_counter()
        while vmm.partition.memory.reaches(bar.gfns.start, Access.READ):
            time.sleep(0)
        windows.append(time.perf_counter() - began)
        vmm.restart(guest, esi=bar.gpa, ebx=1)
    say("watched: from the end of the call until the memslot is gone", windows)
    assert len(windows) == WINDOWS
