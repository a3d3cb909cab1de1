"""What real memory costs a VMM: a fault that is resolved by the kernel, and a munmap with its invalidation.

Owns these measurements, in this process, which is the VMM. The client is in Python, so its cost counts.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median, quantiles
from typing import TypeVar

from report import CONSOLE
from rich.table import Table
from running import Place, daemon_command, server

from intercept_client import BlockingNotifier, BlockingVmm, BlockingVp, libc, memory
from intercept_client.memory import Sharing, UserfaultfdUnavailable, Watch
from intercept_protocol.addresses import UaddrRange
from intercept_protocol.hv_message import build_memory_intercept
from intercept_protocol.messages import (
    AddRegion,
    AddressSpaceKind,
    AttachMemory,
    CreatePartition,
    HypervisorKind,
    MmioGranularity,
    RemoveRegion,
)
from intercept_protocol.outcomes import Access

FIRST_GFN = 0x100
PAGES = 128
RW = Access.READ | Access.WRITE
T = TypeVar("T")
Times = dict[str, list[float]]


def measure(scratch: Path, rounds: int) -> Times:
    """Microseconds, by what was done; `PAGES` of each in every round."""
    times: Times = {}
    with ExitStack() as running:
        path = scratch / "live.sock"
        running.enter_context(server(daemon_command(path), path, Place.ANY_CPU))
        ways = {"announced": Watch.NONE, "watched": Watch.REQUIRED}
        vmms = {}
        for name, watch in ways.items():
            try:
                vmms[name] = running.enter_context(_vmm(path, watch))
            except UserfaultfdUnavailable as why:
                CONSOLE.print(f"{name}: left out: {why}")
        for _ in range(rounds):
            times.setdefault("bare munmap of a page", []).extend(_bare())
            for name, (vmm, vp, notifier) in vmms.items():
                faults, unmaps = _watched(vmm, vp, None if name == "watched" else notifier)
                times.setdefault(f"first touch, {name}", []).extend(faults)
                times.setdefault(f"munmap of a page, {name}", []).extend(unmaps)
    return times


def show(times: Mapping[str, list[float]]) -> None:
    table = Table("", "median us", "p99 us", title="live memory, client in Python", title_justify="left")
    for name, taken in times.items():
        table.add_row(name, f"{median(taken):.0f}", f"{quantiles(taken, n=100)[-1]:.0f}")
    CONSOLE.print(table)


@contextmanager
def _vmm(path: Path, watch: Watch) -> Iterator[tuple[BlockingVmm, BlockingVp, BlockingNotifier]]:
    with ExitStack() as held:
        vmm = held.enter_context(BlockingVmm.open(path, name=watch.name))
        partition = vmm.call(
            CreatePartition(
                address_space=AddressSpaceKind.PROCESS,
                hypervisor=HypervisorKind.SOFTWARE,
                mmio_granularity=MmioGranularity.PAGE,
            )
        )
        with memory.own_memory(watch) as own:
            vmm.call(AttachMemory(promise_begin_end=watch is Watch.NONE), descriptors=own.descriptors)
        vp = held.enter_context(BlockingVp.open(path, partition, vp_index=0))
        yield vmm, vp, held.enter_context(BlockingNotifier.open(path, partition))


def _bare() -> list[float]:
    uaddrs = libc.mmap(UaddrRange(0, PAGES), RW, Sharing.PRIVATE)
    return [_timed(libc.munmap, page) for page in _pages(uaddrs)]


def _watched(
    vmm: BlockingVmm, vp: BlockingVp, notifier: BlockingNotifier | None
) -> tuple[list[float], list[float]]:
    """Touch pages one by one, then unmap them one by one; without a notifier the kernel tells of it."""
    uaddrs = libc.mmap(UaddrRange(0, PAGES), RW, Sharing.PRIVATE)
    where = {"start_gfn": FIRST_GFN, "page_count": PAGES, "start_uaddr": uaddrs.start_uaddr}
    vmm.call(AddRegion(**where, kind="mmio", writable=True, executable=False))
    messages = [build_memory_intercept(gpa=(FIRST_GFN + i) << 12, access=Access.READ) for i in range(PAGES)]
    faults = [_timed(vp.intercept, message) for message in messages]
    unmap = libc.munmap if notifier is None else lambda page: memory.munmap(notifier, page)
    unmaps = [_timed(unmap, page) for page in _pages(uaddrs)]
    vmm.call(RemoveRegion(**where))
    return faults, unmaps


def _pages(uaddrs: UaddrRange) -> list[UaddrRange]:
    """From the end, so that no unmap splits what is left."""
    return [UaddrRange(page - 1, page) for page in range(uaddrs.end, uaddrs.start, -1)]


def _timed(act: Callable[[T], object], argument: T) -> float:
    asked = time.perf_counter()
    act(argument)
    return (time.perf_counter() - asked) * 1e6
