"""What a first touch costs in a VMM of very many VMAs, regions of kind auto: all at once, and one again.

Owns these measurements, in this process, which is the VMM with 8 VPs. The client is in Python, and its
threads wait for one another, too: the slowest touch is an upper bound. Can be run by itself.
"""

from __future__ import annotations

import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles

from report import CONSOLE
from rich.table import Table
from running import Place, daemon_command, server

from intercept_client import BlockingNotifier, BlockingVmm, BlockingVp, libc, memory
from intercept_client.memory import Sharing, UserfaultfdUnavailable, Watch
from intercept_protocol.addresses import GfnRange, UaddrRange
from intercept_protocol.hv_message import build_memory_intercept
from intercept_protocol.messages import (
    AddressSpaceKind,
    CreatePartition,
    HypervisorKind,
)
from intercept_protocol.outcomes import Access, Answer

SIZES = (300, 3_000, 30_000)
VPS = 8
PAGES = 2
"""Of each VMA."""
AGAIN = 20
"""VMAs that are announced as changed and touched again, one at a time."""
FIRST_GFN = 0x1000
RW = Access.READ | Access.WRITE


@dataclass(frozen=True, slots=True)
class Vmm:
    vmm: BlockingVmm
    vps: Sequence[BlockingVp]
    notifier: BlockingNotifier


def show(scratch: Path, most: int = SIZES[-1]) -> None:
    """Measure and print. Ends with an error where a touch is not answered `resume mapped`."""
    table = Table("", "VMAs", "median ms", "p99 ms", "slowest ms", "again, median ms")
    table.title, table.title_justify = f"first touches at once, {VPS} VPs, client in Python", "left"
    for name, watch in (("watched", Watch.REQUIRED), ("announced", Watch.NONE)):
        for size in (size for size in SIZES if size <= most):
            try:
                took, again = _measure(scratch, watch, size)
            except UserfaultfdUnavailable as why:
                CONSOLE.print(f"{name}: left out: {why}")
                break
            figures = (median(took), quantiles(took, n=100)[-1], max(took), median(again))
            table.add_row(name, f"{size:,}", *(f"{seconds * 1e3:.2f}" for seconds in figures))
    CONSOLE.print(table)
    CONSOLE.print("again: after a begin and an end; what is not watched needs another pass over smaps\n")


def _measure(scratch: Path, watch: Watch, vma_count: int) -> tuple[list[float], list[float]]:
    """Seconds for each first touch, and for each touch of a VMA that was announced as changed."""
    with _vmm(scratch, watch) as vmm, _memory(vma_count) as uaddrs:
        gfns = GfnRange.of(FIRST_GFN, uaddrs.page_count)
        vmm.vmm.add_region(gfns, uaddrs, writable=True, executable=False)
        with vmm.notifier.invalidation(uaddrs):
            pass  # what adding the region has found out is not known any more
        took = _touch_all(vmm, vma_count)
        again = []
        for vma in range(vma_count - AGAIN, vma_count):
            start = uaddrs.start + PAGES * vma
            with vmm.notifier.invalidation(UaddrRange(start=start, end=start + PAGES)):
                pass
            again.append(_touch(vmm.vps[0], vma))
    return took, again


def _touch_all(vmm: Vmm, vma_count: int) -> list[float]:
    together = threading.Barrier(len(vmm.vps))
    took: list[float] = []

    def play(index: int) -> None:
        together.wait()
        took.extend([_touch(vmm.vps[index], vma) for vma in range(index, vma_count, len(vmm.vps))])

    threads = [threading.Thread(target=play, args=(index,)) for index in range(len(vmm.vps))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(took) == vma_count, "a VP was answered otherwise"
    return took


def _touch(vp: BlockingVp, vma: int) -> float:
    message = build_memory_intercept(gpa=(FIRST_GFN + PAGES * vma) << 12, access=Access.READ)
    asked = time.perf_counter()
    answer = vp.intercept(message)
    took = time.perf_counter() - asked
    if answer is not Answer.MAPPED:
        raise RuntimeError(f"VMA {vma}: {answer}")
    return took


@contextmanager
def _memory(vma_count: int) -> Iterator[UaddrRange]:
    """Neighbours differ in their rights."""
    uaddrs = libc.mmap(UaddrRange(start=0, end=PAGES * vma_count), RW, Sharing.PRIVATE)
    for start in range(uaddrs.start, uaddrs.end, 2 * PAGES):
        libc.mprotect(UaddrRange(start=start, end=start + PAGES), Access.READ)
    yield uaddrs
    libc.munmap(uaddrs)


@contextmanager
def _vmm(scratch: Path, watch: Watch) -> Iterator[Vmm]:
    path = scratch / f"first-touches-{watch.name}.sock"
    with ExitStack() as held:
        held.enter_context(server(daemon_command(path), path, Place.ANY_CPU))
        vmm = held.enter_context(BlockingVmm.open(path, name="many VMAs"))
        partition = vmm.call(
            CreatePartition(address_space=AddressSpaceKind.PROCESS, hypervisor=HypervisorKind.SOFTWARE)
        )
        with memory.own_memory(watch) as own:
            vmm.attach_memory(own, promise_begin_end=watch is Watch.NONE)
        vps = [held.enter_context(BlockingVp.open(path, partition, vp_index=index)) for index in range(VPS)]
        yield Vmm(vmm, vps, held.enter_context(BlockingNotifier.open(path, partition)))


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(prefix="interceptd-first-touches-") as directory:
        show(Path(directory))
