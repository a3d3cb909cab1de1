"""Guests that read while their VMM changes what they read: real vCPUs, and a check of every value.

Owns the guest's program, its pace and what was found. With each change every vCPU reads a few times, and then
waits for the next one: it would else take the processor from those who are to answer.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Sequence
from typing import Final

from fakes.eventually import PATIENCE
from fakes.region_toggles import (
    PAGES,
    Findings,
    How,
    Kind,
    Layout,
    Toggle,
    all_at_once,
    answer_to,
    page_behind,
)
from fakes.small_vmms import FLOATING
from intercept_client import libc
from intercept_client.kvm import Bus, StopReason, Window
from intercept_client.libc import Sharing
from intercept_protocol.addresses import PAGE_SHIFT, PAGE_SIZE, UaddrRange
from intercept_protocol.outcomes import Access, Answer
from interceptctl.guest.emulated import Reports
from interceptctl.guest.programs import REPORT_PORT, Program
from interceptctl.guest.small_vmm import SmallVmm, start_state
from interceptctl.guest.vmm import ENTRY, PROGRAM_BYTES

VCPUS: Final = 8
READS: Final = 16
"""With each change, of a vCPU whose gfn is always covered."""
READS_OF_NOTHING: Final = 1
"""Of one whose gfn is covered only sometimes: the daemon is asked about each read."""
PACE_PORT: Final = 0x11
FIRST_WORD: Final = 0x5EED_0000
"""Of the first page; each further one has the next number."""

PROBE: Final = Program(
    "probe",
    "reads the word at esi ebp times, reports what is neither ebx nor edx, asks for its pace, and so on",
    """
next_round:
    mov   ecx, ebp
next:
    mov   eax, [esi]
    cmp   eax, ebx
    je    right
    cmp   eax, edx
    je    right
    out   0x10, eax
right:
    dec   ecx
    jnz   next
    out   0x11, eax
    jmp   next_round
""",
    bytes.fromhex("89e9 8b06 39d8 7406 39d0 7402 e710 49 75f1 e711 ebeb"),
)


class Pace:
    """The port where vCPUs wait for the next change. Thread-safe."""

    def __init__(self) -> None:
        self._turned = threading.Condition()
        self._begun = self._waiting = 0
        self._is_over = False

    def read(self, offset: int, size: int) -> bytes:  # noqa: ARG002 - nothing to be read
        return bytes(size)

    def write(self, offset: int, data: bytes) -> None:  # noqa: ARG002 - what it says is of no matter
        with self._turned:
            begun = self._begun
            self._waiting += 1
            self._turned.notify_all()
            self._turned.wait_for(lambda: self._is_over or self._begun > begun)

    def wait(self) -> bool:
        """Block until every vCPU waits. False if that will not be: it is over."""
        with self._turned:
            wait_for = self._turned.wait_for
            assert wait_for(lambda: self._is_over or self._waiting == VCPUS, PATIENCE), "a vCPU hangs"
            return not self._is_over

    def begin(self) -> None:
        """Let all of them read."""
        with self._turned:
            self._begun += 1
            self._waiting = 0
            self._turned.notify_all()

    def finish(self) -> None:
        with self._turned:
            self._is_over = True
            self._turned.notify_all()


class GuestRace:
    """One guest, with memory whose pages differ in their first word."""

    def __init__(self, vmm: SmallVmm, kinds: Sequence[Kind]) -> None:
        self._vmm = vmm
        anywhere = UaddrRange.of_pages(0, PAGES * len(kinds))
        self._memory = libc.mmap(anywhere, Access.READ | Access.WRITE, Sharing.PRIVATE)
        for page in range(self._memory.page_count):
            word = ctypes.c_uint32.from_address(self._memory.start_uaddr + page * PAGE_SIZE)
            word.value = FIRST_WORD + page
        self._toggle: Toggle = all_at_once(kinds, self._memory.start)
        gfns = self._toggle.gfns()
        self._places = [gfns[index * len(gfns) // VCPUS] for index in range(VCPUS)]
        """Of the vCPUs."""
        self._pace, self._reports = Pace(), Reports()
        self._found = Findings()

    def run(self, changes: int, how: How) -> Findings:
        vmm, pace = self._vmm, self._pace
        vmm.partition.change_regions(add=self._toggle.after(0))
        for index, gfn in enumerate(self._places):
            self._add_vcpu(index, gfn)
        running = vmm.start()
        for vcpu in running:
            vcpu.add_done_callback(lambda _: pace.finish())
        try:
            while pace.wait() and self._found.changes < changes:
                self._look()
                pace.begin()
                self._change(how)
                self._look()
        finally:
            for guest in vmm.vcpus:
                guest.stop()
            pace.finish()
        for vcpu in running:
            stop = vcpu.result(PATIENCE)
            if stop.reason is not StopReason.ASKED:
                self._found.object(str(stop))
        self._count()
        return self._found

    def _add_vcpu(self, index: int, gfn: int) -> None:
        before, after = (self._word(self._toggle.after(n), gfn) for n in (0, 1))
        entry = ENTRY + index * PROGRAM_BYTES
        self._vmm.ram.write(entry, PROBE.code)
        registers = {"esi": gfn << PAGE_SHIFT, "ebx": before, "edx": after, "ebp": self._reads(gfn)}
        ports = Bus(Window(REPORT_PORT, 1, self._reports), Window(PACE_PORT, 1, self._pace))
        self._vmm.vcpus.append(
            self._vmm.partition.add_vcpu(index, start_state(entry, registers), ports=ports)
        )

    def _word(self, layout: Layout, gfn: int) -> int:
        page = page_behind(layout, gfn)
        return FLOATING if page is None else FIRST_WORD + page - self._memory.start

    def _reads(self, gfn: int) -> int:
        return READS if self._toggle.covers_always(gfn) else READS_OF_NOTHING

    def _change(self, how: How) -> None:
        change = self._found.changes
        removed, added = self._toggle.removed(change), self._toggle.added(change)
        if how is How.IN_TWO_STEPS:
            for gfns, uaddrs in removed:
                self._vmm.partition.remove_region(gfns, uaddrs)
            removed = []
        self._vmm.partition.change_regions(remove=removed, add=added)
        self._found.changes += 1

    def _look(self) -> None:
        """No change is under way: what KVM has is of the last one's layout."""
        layout = self._toggle.after(self._found.changes)
        for slot in self._vmm.partition.memory.slots:
            for gfn in filter(slot.gfns.__contains__, self._toggle.gfns()):
                self._found.pages_reached += 1
                may_write = answer_to(layout, gfn, Access.WRITE) is Answer.MAPPED
                if slot.uaddr_page(gfn) != page_behind(layout, gfn) or (slot.is_writable and not may_write):
                    self._found.object(f"gfn {gfn:#x}: {slot}")

    def _count(self) -> None:
        for gfn, vcpu in zip(self._places, self._vmm.vcpus, strict=True):
            self._found.accesses += self._found.changes * self._reads(gfn)
            self._found.answers.update(vcpu.tally.intercepts)
            if self._toggle.covers_always(gfn):
                self._found.gaps += vcpu.tally.intercepts[Answer.NO_REGION]
        kept = self._reports.kept
        for value in kept:
            self._found.object(f"a guest read {value:#x}")
        self._found.wrong += self._reports.count - len(kept)
