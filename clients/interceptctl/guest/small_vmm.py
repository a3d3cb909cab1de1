"""The small VMM in Python: a guest with RAM at 0, BARs where the caller puts them, and an emulated register.

Owns the guest's physical layout and the memory behind it; must not know what programs are for. All memory is
in memfds, which stand in for what a real VMM passes through and stay readable after an unmap.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import ExitStack, closing
from dataclasses import dataclass
from types import TracebackType
from typing import Final, Self

from intercept_client import libc, memory
from intercept_client.kvm import (
    Bus,
    GuestPartition,
    GuestVcpu,
    Machine,
    PartitionSetting,
    Register,
    StartState,
    Stop,
    Window,
)
from intercept_client.libc import Sharing
from intercept_protocol.addresses import PAGE_SHIFT, PAGE_SIZE, GfnRange, UaddrRange
from intercept_protocol.messages import RequestedKind
from intercept_protocol.outcomes import Access

from .emulated import Reports, Scratch
from .programs import REPORT_PORT, Program
from .vmm import BAR_GFN, ENTRY, PROGRAM_BYTES, RAM_PAGES, SCRATCH_GPA, STRANGERS

MMIO_EXITS: Final = "mmio_exits"
READ_WRITE: Final = Access.READ | Access.WRITE


@dataclass(frozen=True, slots=True)
class Bar:
    """Memory shown to the guest: its gfns at first, its uaddrs, and the memfd behind it."""

    gfns: GfnRange
    uaddrs: UaddrRange
    file: int
    kind: RequestedKind
    partition: GuestPartition

    @property
    def gpa(self) -> int:
        return self.gfns.start << PAGE_SHIFT

    def read(self, offset: int, size: int) -> bytes:
        """Read from the file, even if it is not mapped."""
        return os.pread(self.file, size, offset)

    def write(self, offset: int, data: bytes) -> None:
        os.pwrite(self.file, data, offset)

    def word(self, offset: int) -> int:
        return int.from_bytes(self.read(offset, 4), "little")

    def move(self, gfn: int) -> None:
        self.partition.remove_region(self.gfns, self.uaddrs)
        moved = GfnRange(start=gfn, end=gfn + self.gfns.page_count)
        self.partition.add_region(moved, self.uaddrs, self.kind, writable=True, executable=False)

    def unmap(self) -> None:
        memory.munmap(self.partition.notifier, self.uaddrs)
        self.partition.remove_region(self.gfns, self.uaddrs)

    def reuse(self) -> None:
        libc.mmap(self.uaddrs, READ_WRITE, Sharing.PRIVATE, flags=libc.MAP_FIXED)
        ctypes.memset(self.uaddrs.start_uaddr, STRANGERS, self.uaddrs.length)

    def hand_over(self) -> None:
        with self.partition.notifier.invalidation(self.uaddrs):
            self.reuse()
            self.partition.remove_region(self.gfns, self.uaddrs)

    def take_back(self) -> None:
        libc.mmap(self.uaddrs, READ_WRITE, Sharing.SHARED, flags=libc.MAP_FIXED, file=self.file)
        self.partition.add_region(self.gfns, self.uaddrs, self.kind, writable=True, executable=False)


def _nothing(_why: str) -> None:
    """The default `on_lost`: the reasons why the vCPUs stopped say enough."""


class SmallVmm:
    """One guest. Closing it stops its vCPUs first."""

    def __init__(
        self,
        path: str | os.PathLike[str],
        setting: PartitionSetting,
        on_lost: Callable[[str], None] = _nothing,
        *,
        open_machine: Callable[[], Machine] = Machine.open,
    ) -> None:
        """Raises `KvmUnavailable`, or what `GuestPartition.open` raises."""
        self.path: Final = path
        self.reports: Final = Reports()
        self.scratch: Final = Scratch(PAGE_SIZE)
        self.vcpus: Final[list[GuestVcpu]] = []
        self._running: list[Future[Stop]] = []
        self._opened = ExitStack()
        try:
            machine = self._opened.enter_context(open_machine())
            self.partition: Final = self._opened.enter_context(
                GuestPartition.open(path, machine, setting, on_lost)
            )
            self.ram: Final = self.add_bar(RAM_PAGES, at=0, kind=RequestedKind.MOVABLE, executable=True)
        except BaseException:
            self._opened.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
        self._opened.close()

    def add_bar(
        self,
        page_count: int,
        *,
        at: int = BAR_GFN,
        kind: RequestedKind = RequestedKind.MMIO,
        writable: bool = True,
        executable: bool = False,
    ) -> Bar:
        """A new memfd, mapped here and registered as a region at gfn `at`."""
        file = os.memfd_create(f"gfn-{at:#x}", os.MFD_CLOEXEC)
        self._opened.callback(os.close, file)
        os.ftruncate(file, page_count * PAGE_SIZE)
        uaddrs = libc.mmap(UaddrRange.of_pages(0, page_count), READ_WRITE, Sharing.SHARED, file=file)
        bar = Bar(GfnRange(start=at, end=at + page_count), uaddrs, file, kind, self.partition)
        self.partition.add_region(bar.gfns, uaddrs, kind, writable=writable, executable=executable)
        return bar

    def add_vcpu(self, program: Program, **registers: int) -> GuestVcpu:
        """A vCPU that will run `program`, its registers (`esi=...`) as given."""
        index = len(self.vcpus)
        entry = ENTRY + index * PROGRAM_BYTES
        self.ram.write(entry, program.code)
        vcpu = self.partition.add_vcpu(
            index,
            start_state(entry, registers),
            devices=Bus(Window(SCRATCH_GPA, PAGE_SIZE, self.scratch)),
            ports=Bus(Window(REPORT_PORT, 1, self.reports)),
        )
        self.vcpus.append(vcpu)
        return vcpu

    def restart(self, vcpu: GuestVcpu, **registers: int) -> None:
        """Reset a stopped vCPU to the beginning of its program."""
        entry = ENTRY + self.vcpus.index(vcpu) * PROGRAM_BYTES
        vcpu.vcpu.start_at(start_state(entry, registers))

    def start(self) -> list[Future[Stop]]:
        """Run all vCPUs that are not running, each in its own thread. A stopped one continues, one that
        halted after its halt."""
        running = dict(zip(range(len(self.vcpus)), self._running, strict=False))
        self._running = [
            running[index] if index in running and not running[index].done() else vcpu.start()
            for index, vcpu in enumerate(self.vcpus)
        ]
        return self._running

    def stop(self) -> list[Stop]:
        """Stop all vCPUs, wait for their threads, and return why each stopped."""
        for vcpu, running in zip(self.vcpus, self._running, strict=False):
            if not running.done():
                vcpu.stop()
        return [running.result() for running in self._running]

    @property
    def scratch_accesses(self) -> int:
        return self.scratch.accesses

    @property
    def memslots(self) -> int:
        return len(self.partition.memory.slots)

    def mmio_exits(self, index: int) -> int | None:
        """Of a vCPU, by KVM's own count; None where the kernel has none."""
        try:
            statistics = self.vcpus[index].vcpu.statistics()
        except OSError:  # before Linux 5.14
            return None
        with closing(statistics):
            return statistics.read(MMIO_EXITS) if MMIO_EXITS in statistics.names else None

    def survived(self) -> tuple[int, int]:
        said = self.partition.vmm.statistics()
        return said.restarts, said.open_invalidations


def start_state(entry: int, registers: dict[str, int]) -> StartState:
    """Registers by their lower-case names."""
    return StartState(entry, tuple((Register[name.upper()], value) for name, value in registers.items()))
