"""What real memory costs a VMM: a fault that is resolved by the kernel, and a munmap with its invalidation.

Owns these measurements, in this process, which is the VMM. The client is in Python, so its cost counts; not
in what the daemon took of the CPU.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median, quantiles
from typing import TypeVar

from report import CONSOLE
from rich.table import Table
from running import Place, cpu_seconds, daemon_command, server, this_process_at

from intercept_client import BlockingNotifier, BlockingVmm, BlockingVp, libc, memory
from intercept_client.memory import Sharing, UserfaultfdUnavailable, Watch
from intercept_protocol.addresses import UaddrRange
from intercept_protocol.hv_message import build_memory_intercept
from intercept_protocol.messages import (
    AddRegion,
    AddressSpaceKind,
    CreatePartition,
    HypervisorKind,
    Invalidate,
    MapVma,
    MmioGranularity,
    RemoveRegion,
    RequestedKind,
    UnmapVma,
)
from intercept_protocol.outcomes import Access

FIRST_GFN = 0x100
PAGES = 128
RW = Access.READ | Access.WRITE
T = TypeVar("T")
ECHO, DECLARED, BARE = "Python echo", "first touch, declared memory", "munmap of a page, bare"
"""What the others are to be held against. The echo is another process at the other end of a socket pair."""
ECHOED_BYTES, ANSWER_BYTES = 270, 20
"""As long as an intercept and its answer."""


@dataclass(frozen=True, slots=True)
class Figures:
    """Microseconds: each as its caller saw it, and what the daemon took of the CPU for one, by round."""

    taken: list[float] = field(default_factory=list)
    daemon_cpu: list[float] = field(default_factory=list)


Measured = Mapping[str, Figures]


class Stopwatch:
    """Times what is done, `PAGES` of each in every round."""

    def __init__(self, daemon_pid: int) -> None:
        self.figures: dict[str, Figures] = {}
        self._daemon_pid = daemon_pid

    def each(
        self,
        name: str,
        act: Callable[[T], object],
        arguments: Sequence[T],
        settle: Callable[[], object] = lambda: None,
    ) -> None:
        """`settle` waits for what the daemon does after it has answered."""
        figures = self.figures.setdefault(name, Figures())
        spent = cpu_seconds(self._daemon_pid)
        for argument in arguments:
            asked = time.perf_counter()
            act(argument)
            figures.taken.append((time.perf_counter() - asked) * 1e6)
        settle()
        spent = cpu_seconds(self._daemon_pid) - spent
        figures.daemon_cpu.append(spent * 1e6 / len(arguments))


def measure(scratch: Path, rounds: int) -> dict[Place, Measured]:
    return {place: _measure(scratch, place, rounds) for place in Place}


def show(measured: Mapping[Place, Measured]) -> None:
    for place, figures in measured.items():
        columns = ("", "median us", "in echoes", "p99 us", "daemon's CPU us")
        table = Table(*columns, title=f"live memory, {place.value}, client in Python", title_justify="left")
        for name, of_it in figures.items():
            p99 = quantiles(of_it.taken, n=100)[-1]
            cpu = "" if name in (ECHO, BARE) else f"{median(of_it.daemon_cpu):.0f}"
            echoes = median(of_it.taken) / median(figures[ECHO].taken)
            table.add_row(name, f"{median(of_it.taken):.0f}", f"{echoes:.1f}", f"{p99:.0f}", cpu)
        CONSOLE.print(table)


def as_json(measured: Mapping[Place, Measured]) -> dict[str, object]:
    return {
        place.value: {
            name: {
                "p50": median(of_it.taken),
                "p99": quantiles(of_it.taken, n=100)[-1],
                "daemon_cpu": median(of_it.daemon_cpu),
            }
            for name, of_it in figures.items()
        }
        for place, figures in measured.items()
    }


def _measure(scratch: Path, place: Place, rounds: int) -> Measured:
    with ExitStack() as running:
        running.enter_context(this_process_at(place))
        path = scratch / f"live-{place.name}.sock"
        daemon = running.enter_context(server(daemon_command(path), path, place))
        watch = Stopwatch(daemon.pid)
        vmms = {}
        for name, how in {"announced": Watch.NONE, "watched": Watch.REQUIRED}.items():
            try:
                vmms[name] = running.enter_context(_vmm(path, how))
            except UserfaultfdUnavailable as why:
                CONSOLE.print(f"{name}: left out: {why}")
        declared, declared_vp, _ = running.enter_context(_vmm(path, None))
        ask = running.enter_context(echo())
        for _ in range(rounds):
            watch.each(ECHO, ask, [bytes(ECHOED_BYTES)] * PAGES)
            _bare(watch)
            _declared(watch, declared, declared_vp)
            for name, (vmm, vp, notifier) in vmms.items():
                _live(watch, name, vmm, vp, notifier)
    return watch.figures


@contextmanager
def echo() -> Iterator[Callable[[bytes], bytes]]:
    """Ask another process, which answers at once."""
    here, there = socket.socketpair()
    with here, there:
        child = os.fork()
        if not child:
            here.close()
            while there.recv(ECHOED_BYTES):
                there.send(bytes(ANSWER_BYTES))
            os._exit(0)
        there.close()
        yield lambda asked: (here.send(asked), here.recv(ECHOED_BYTES))[1]
    os.waitpid(child, 0)


@contextmanager
def _vmm(path: Path, watch: Watch | None) -> Iterator[tuple[BlockingVmm, BlockingVp, BlockingNotifier]]:
    """A VMM with a VP and a notifier connection; of declared memory where nothing is to be watched."""
    kind = AddressSpaceKind.DECLARED if watch is None else AddressSpaceKind.PROCESS
    with ExitStack() as held:
        vmm = held.enter_context(BlockingVmm.open(path, name=kind.value))
        partition = vmm.call(
            CreatePartition(
                address_space=kind,
                hypervisor=HypervisorKind.SOFTWARE,
                mmio_granularity=MmioGranularity.PAGE,
            )
        )
        if watch is not None:
            with memory.own_memory(watch) as own:
                vmm.attach_memory(own, promise_begin_end=watch is Watch.NONE)
        vp = held.enter_context(BlockingVp.open(path, partition, vp_index=0))
        yield vmm, vp, held.enter_context(BlockingNotifier.open(path, partition))


def _bare(watch: Stopwatch) -> None:
    watch.each(BARE, libc.munmap, _pages(libc.mmap(UaddrRange.of_pages(0, PAGES), RW, Sharing.PRIVATE)))


def _declared(watch: Stopwatch, vmm: BlockingVmm, vp: BlockingVp) -> None:
    uaddrs = UaddrRange(start=PAGES, end=2 * PAGES)
    where = {"start_uaddr": uaddrs.start_uaddr, "page_count": PAGES}
    vmm.call(MapVma(**where, start_pfn=0, readable=True, writable=True, executable=False, io=True))
    with _region(vmm, uaddrs):
        watch.each(DECLARED, vp.intercept, _touches())
    vmm.call(UnmapVma(**where))


def _live(watch: Stopwatch, name: str, vmm: BlockingVmm, vp: BlockingVp, notifier: BlockingNotifier) -> None:
    """Touch pages one by one, then unmap them one by one; what is watched, the kernel tells of."""
    uaddrs = libc.mmap(UaddrRange.of_pages(0, PAGES), RW, Sharing.PRIVATE)
    served = partial(notifier.call, Invalidate(start_uaddr=uaddrs.start_uaddr, length=uaddrs.length))
    with _region(vmm, uaddrs):
        watch.each(f"first touch, {name}", vp.intercept, _touches())
        unmap = libc.munmap if name == "watched" else partial(memory.munmap, notifier)
        watch.each(f"munmap of a page, {name}", unmap, _pages(uaddrs), served)


@contextmanager
def _region(vmm: BlockingVmm, uaddrs: UaddrRange) -> Iterator[None]:
    where = {"start_gfn": FIRST_GFN, "page_count": PAGES, "start_uaddr": uaddrs.start_uaddr}
    vmm.call(AddRegion(**where, kind=RequestedKind.MMIO, writable=True, executable=False))
    yield
    vmm.call(RemoveRegion(**where))


def _touches() -> list[bytes]:
    return [build_memory_intercept(gpa=(FIRST_GFN + i) << 12, access=Access.READ) for i in range(PAGES)]


def _pages(uaddrs: UaddrRange) -> list[UaddrRange]:
    """From the end, so that no unmap splits what is left."""
    return [UaddrRange(start=page - 1, end=page) for page in range(uaddrs.end, uaddrs.start, -1)]
