"""What a first touch costs, what later accesses cost, and how long the watched window is; printed, not
judged."""

from __future__ import annotations

import ctypes
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from statistics import median, quantiles

import pytest

from fakes.eventually import PATIENCE
from fakes.small_vmms import StartVmm, map_stranger, run
from intercept_client import libc
from intercept_client.kvm import Coverage, Machine, PartitionSetting, StartState
from intercept_client.kvm._copying import AnnouncedCopier, CheckedCopier, Copier, DirectCopier
from intercept_client.kvm._guest_memory import GuestMemory
from intercept_client.kvm._memslots import MERGE_STEP, MemslotTable
from intercept_client.libc import Sharing
from intercept_protocol.addresses import GfnRange, UaddrRange
from intercept_protocol.errors import WireError
from intercept_protocol.messages import MmioGranularity
from intercept_protocol.outcomes import Access
from interceptctl.guest.programs import STORE, SWEEP
from interceptctl.guest.small_vmm import READ_WRITE
from interceptctl.guest.vmm import BAR_GFN, SCRATCH_GPA

pytestmark = [pytest.mark.verify, pytest.mark.alone]
PAGES, ROUNDS, WINDOWS = 1024, 50, 50
KVM_SLOTS = 32764
"""KVM_CAP_NR_MEMSLOTS on x86-64; older kernels have 509."""
MAP_NORESERVE = 0x4000
SPIN = b"\xeb\xfe"


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


def test_slots_run_short(machine: Machine) -> None:
    """Windows of 2 MiB, as the daemon maps RAM; a vCPU runs meanwhile."""
    slots, windows, window = 1024, 3 * 1024, 512
    machine.slot_limit = slots
    ram = libc.mmap(
        UaddrRange(start=0, end=windows * window), READ_WRITE, Sharing.PRIVATE, flags=MAP_NORESERVE
    )
    memory, vcpu = GuestMemory(machine), machine.create_vcpu(0)
    plain, merging, done = list[float](), list[float](), threading.Event()

    def run_vcpu() -> None:
        with vcpu.on_this_thread():
            while not done.is_set():
                with memory.gate.inside(vcpu):
                    vcpu.run()

    memory.map(GfnRange(start=0, end=window), UaddrRange(start=ram.start, end=ram.start + window), READ_WRITE)
    ctypes.memmove(ram.start_uaddr, SPIN, len(SPIN))
    vcpu.start_at(StartState(0))
    with ThreadPoolExecutor(1) as threads:
        running = threads.submit(run_vcpu)
        for start in range(window, windows * window, window):
            before = len(memory.slots)
            began = time.perf_counter()
            memory.map(
                GfnRange(start=start, end=start + window),
                UaddrRange(start=ram.start + start, end=ram.start + start + window),
                READ_WRITE,
            )
            took = time.perf_counter() - began
            (plain if len(memory.slots) > before else merging).append(took)
        done.set()
        vcpu.kick()
        running.result(PATIENCE)

    say("a memslot comes and there is room", plain)
    say(f"a memslot comes and {MERGE_STEP} are merged for it", merging)
    assert len(memory.slots) <= slots
    libc.munmap(ram)


def test_looking_for_slots_to_merge(kvm: None) -> None:  # noqa: ARG001 - one of the figures of KVM
    """As many as maps may take; the worst case: nothing continues anything."""
    table, held = MemslotTable(KVM_SLOTS), KVM_SLOTS - KVM_SLOTS // 8
    for start in range(0, 2 * held, 2):
        gfns, uaddrs = GfnRange(start=start, end=start + 1), UaddrRange(start=start, end=start + 1)
        table.apply(table.plan_map(gfns, uaddrs, READ_WRITE))

    began = time.perf_counter()
    with pytest.raises(WireError, match="ENOSPC"):
        table.plan_map(
            GfnRange(start=0x10_0000, end=0x10_0001), UaddrRange(start=0x10_0000, end=0x10_0001), READ_WRITE
        )

    print(f"\nlooking through {held:,} slots in vain: {(time.perf_counter() - began) * 1e3:.0f} ms")


def test_copying_an_access() -> None:
    page = libc.mmap(UaddrRange(start=0, end=1), READ_WRITE, Sharing.PRIVATE)
    copiers: tuple[Copier, ...] = (DirectCopier(), CheckedCopier(), AnnouncedCopier())
    for copier in copiers:
        copier.write(page.start_uaddr, bytes(8))
        seconds = []
        for _ in range(2000):
            began = time.perf_counter()
            data = copier.read(page.start_uaddr, 8)
            seconds.append(time.perf_counter() - began)
        say(f"{type(copier).__name__} reads 8 bytes", seconds)
        assert data == bytes(8)
    libc.munmap(page)


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
