"""A VMM with real memory in its own process: the commands that it obeys.

Owns its mappings' verbs and its connections, made with the client library. What a verb does to memory is not
announced unless it says so. Must not know how it is told, nor what is right.
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import signal
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from ctypes import memset, string_at
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from fakes.raw_client import READ, intercept_message
from intercept_client import BlockingNotifier, BlockingVmm, BlockingVp, libc
from intercept_client.libc import Sharing
from intercept_client.memory import Watch, own_memory
from intercept_protocol.addresses import PAGE_SIZE, GfnRange, UaddrRange
from intercept_protocol.messages import (
    AddressSpaceKind,
    AttachMemory,
    HypervisorKind,
    MappingView,
    RequestedKind,
    Translation,
)
from intercept_protocol.outcomes import Access, AnyAnswer

GFN: Final = 0x100
"""Where tests put their first region."""
RW: Final = Access.READ | Access.WRITE
MAP_FIXED_NOREPLACE: Final = 0x100000
IPC_PRIVATE: Final = 0
IPC_RMID: Final = 0
_system_v = ctypes.CDLL(None)
_system_v.shmat.restype = ctypes.c_void_p
QUIET_PAGE: Final = 0x20_0000_0000 // PAGE_SIZE
"""From here on the kernel puts nothing of its own accord: a hole stays one, whatever threads and allocators
of this process do."""
ELSEWHERE: Final = UaddrRange(start=1, end=2)
"""Where no process has anything mapped (mmap_min_addr)."""


@dataclass(frozen=True, slots=True)
class Memory:
    """Mapped pages, and the descriptor of the file behind them in the VMM, or -1."""

    uaddrs: UaddrRange
    file: int = -1

    def part(self, start: int, end: int) -> UaddrRange:
        return UaddrRange(start=self.uaddrs.start + start, end=self.uaddrs.start + end)


class LiveVmm:
    """The verbs. `connect` and `attach` come first for those that need a partition."""

    vmm: BlockingVmm
    notifier: BlockingNotifier
    path: Path

    def __init__(self, first_page: int = QUIET_PAGE) -> None:
        self._vps: dict[int, BlockingVp] = {}
        self._lock = threading.Lock()
        self.kept_userfaultfd = -1
        self.mapped: list[UaddrRange] = []
        self._next_page = first_page
        self._afterwards: Callable[[int], None] = lambda control: None  # noqa: ARG005 - nothing to do

    def after_the_answer(self, act: Callable[[int], None]) -> None:
        """Do something, given the control socket, once it was told that this verb is over."""
        self._afterwards = act

    def do_afterwards(self, control: int) -> None:
        self._afterwards(control)

    # ------------------------------------------------ its partition

    def connect(
        self,
        path: Path,
        invalidate_timeout_ms: int | None = None,
        hypervisor: HypervisorKind = HypervisorKind.SOFTWARE,
    ) -> int:
        """Create a partition over this process's memory; returns its id."""
        self.path = path
        self.vmm = BlockingVmm.open(path, name="live")
        self.partition = self.vmm.create_partition(
            AddressSpaceKind.PROCESS, hypervisor, invalidate_timeout_ms=invalidate_timeout_ms
        )
        self.notifier = BlockingNotifier.open(path, self.partition)
        return self.partition.partition_id

    @property
    def credentials(self) -> dict[str, object]:
        """The fields of a hello that joins this partition."""
        return {"partition_id": self.partition.partition_id, "token": self.partition.token}

    def attach(self, watch: Watch, *, promise: bool) -> None:
        with own_memory(watch) as memory:
            self.vmm.attach_memory(memory, promise_begin_end=promise)

    def attach_and_keep_userfaultfd(self) -> None:
        """What a VMM must not do."""
        with own_memory(Watch.REQUIRED) as memory:
            self.vmm.call(AttachMemory(), descriptors=memory.descriptors)
            self.kept_userfaultfd = os.dup(memory.descriptors[-1])

    def open_vp(self, vp_index: int) -> BlockingVp:
        with self._lock:
            if vp_index not in self._vps:
                self._vps[vp_index] = BlockingVp.open(self.path, self.partition, vp_index=vp_index)
            return self._vps[vp_index]

    def add_region(
        self,
        start_gfn: int,
        uaddrs: UaddrRange,
        kind: str = "movable",
        writable: bool = True,
    ) -> str:
        """Returns the kind that it has."""
        gfns = GfnRange.of(start_gfn, uaddrs.page_count)
        return self.vmm.add_region(
            gfns, uaddrs, RequestedKind(kind), writable=writable, executable=False
        ).value

    def remove_region(self, start_gfn: int, uaddrs: UaddrRange) -> None:
        self.vmm.remove_region(GfnRange.of(start_gfn, uaddrs.page_count), uaddrs)

    def fault(self, gfn: int, access: int = READ, vp_index: int = 0) -> AnyAnswer:
        return self.open_vp(vp_index).intercept(intercept_message(gfn, access))

    def prefault(self, start_gfn: int, page_count: int) -> int:
        return self.vmm.prefault(GfnRange.of(start_gfn, page_count))

    def list_mappings(self) -> list[MappingView]:
        return self.vmm.list_mappings()

    def translate(self, gfn: int) -> Translation | None:
        return self.vmm.translate(gfn)

    def reached(self, start_gfn: int, page_count: int) -> list[int]:
        """Which of these gfns the guest reaches, counted from the first."""
        return [n for n in range(page_count) if self.translate(start_gfn + n) is not None]

    def counter(self, name: str) -> int:
        count: int = getattr(self.vmm.statistics(), name)
        return count

    def drain(self) -> None:
        """Return once everything reported so far is revoked from the guest."""
        self.notifier.invalidate(ELSEWHERE)

    # ------------------------------------------------ its memory

    def memfd(self, page_count: int, tag: str = "bar") -> int:
        """A file whose every page says which it is."""
        file = os.memfd_create(tag)
        for page in range(page_count):
            os.pwrite(file, page_content(tag, page), page * PAGE_SIZE)
        return file

    def map_memfd(self, page_count: int, tag: str = "bar", access: Access = RW) -> Memory:
        file = self.memfd(page_count, tag)
        return Memory(self.map(page_count, file=file, access=access), file)

    def map(
        self,
        page_count: int,
        *,
        file: int = -1,
        first_page: int = 0,
        access: Access = RW,
        sharing: Sharing | None = None,
        at: UaddrRange | None = None,
    ) -> UaddrRange:
        """Map at free addresses, or exactly at the start of `at`, replacing what is mapped there."""
        if sharing is None:
            sharing = Sharing.SHARED if file >= 0 else Sharing.PRIVATE
        wanted = (
            self.free_space(page_count)
            if at is None
            else UaddrRange(start=at.start, end=at.start + page_count)
        )
        flags = MAP_FIXED_NOREPLACE if at is None else libc.MAP_FIXED
        uaddrs = libc.mmap(wanted, access, sharing, flags=flags, file=file, offset=first_page * PAGE_SIZE)
        self.mapped.append(uaddrs)
        return uaddrs

    def map_path(self, path: Path, page_count: int) -> UaddrRange:
        """Map a file on disk, and keep no descriptor of it."""
        file = os.open(path, os.O_RDWR)
        try:
            return self.map(page_count, file=file)
        finally:
            os.close(file)

    def attach_segment(self, page_count: int) -> tuple[int, UaddrRange]:
        """A System V segment that is gone once it is detached: its id, and where it is."""
        size = page_count * PAGE_SIZE
        identifier: int = _system_v.shmget(IPC_PRIVATE, ctypes.c_size_t(size), 0o600)
        uaddrs = self.free_space(page_count)
        attached: int = _system_v.shmat(identifier, ctypes.c_void_p(uaddrs.start_uaddr), 0)
        _system_v.shmctl(identifier, IPC_RMID, None)
        assert attached == uaddrs.start_uaddr, "cannot attach a System V segment"
        return identifier, uaddrs

    def use_huge_pages(self, uaddrs: UaddrRange) -> None:
        libc.madvise(uaddrs, mmap.MADV_HUGEPAGE)
        self.write(uaddrs)

    def munmap(self, uaddrs: UaddrRange) -> None:
        libc.munmap(uaddrs)

    def mprotect(self, uaddrs: UaddrRange, access: Access) -> None:
        libc.mprotect(uaddrs, access)

    def free_space(self, page_count: int) -> UaddrRange:
        """Free addresses, with free pages before and after, that are handed out once."""
        start = self._next_page
        self._next_page += page_count + 1
        return UaddrRange(start=start, end=start + page_count)

    def touch(self, uaddrs: UaddrRange) -> None:
        """Read every page."""
        for page in range(uaddrs.start, uaddrs.end):
            string_at(page * PAGE_SIZE, 1)

    def write(self, uaddrs: UaddrRange) -> None:
        """Write to every page."""
        for page in range(uaddrs.start, uaddrs.end):
            memset(page * PAGE_SIZE, ord("w"), 1)

    def vma_named(self, name: str) -> UaddrRange:
        line = next(line for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith(name))
        start, end = line.split()[0].split("-")
        return UaddrRange(start=int(start, 16) // PAGE_SIZE, end=int(end, 16) // PAGE_SIZE)

    def vvar_and_the_page_before(self) -> UaddrRange:
        """An ordinary page, and the PFN-mapped VMA that every process has."""
        vvar = self.vma_named("[vvar]")
        before = UaddrRange(start=vvar.start - 1, end=vvar.start)
        with suppress(FileExistsError):  # something is there already, which will do
            libc.mmap(before, RW, Sharing.PRIVATE, flags=MAP_FIXED_NOREPLACE)
        return UaddrRange(start=before.start, end=vvar.end)

    # ------------------------------------------------ its life

    def fork(self) -> int:
        """A child that holds everything this process holds, until it is killed."""
        child = os.fork()
        if not child:
            while True:
                signal.pause()
        return child

    def fork_and_reap(self, act: Callable[[], None]) -> None:
        """Have a child do something to its copy of the memory."""
        child = os.fork()
        if not child:
            act()
            os._exit(0)
        os.waitpid(child, 0)

    def let_sockets_survive_exec(self) -> None:
        for entry in os.listdir("/proc/self/fd"):
            try:
                with socket.socket(fileno=os.dup(int(entry))):
                    os.set_inheritable(int(entry), True)
            except OSError:
                continue

    def clear_nonblocking(self) -> None:
        flags = fcntl.fcntl(self.kept_userfaultfd, fcntl.F_GETFL)
        fcntl.fcntl(self.kept_userfaultfd, fcntl.F_SETFL, flags & ~os.O_NONBLOCK)


def page_content(tag: str, page: int) -> bytes:
    return f"{tag} {page}".encode().ljust(PAGE_SIZE, b".")
