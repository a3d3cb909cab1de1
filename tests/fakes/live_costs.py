"""What watching costs a VMM, and what a large VMM that forks costs the others, measured inside the VMM.

Owns the measurements; seconds unless said otherwise. Must not know what is acceptable.
"""

from __future__ import annotations

import ctypes
import os
import threading
import time
from collections.abc import Callable
from statistics import quantiles
from typing import Final

from fakes.live_vmm import GFN, RW, LiveVmm
from fakes.raw_client import READ, intercept_message
from intercept_client import libc
from intercept_client.libc import Sharing
from intercept_protocol.addresses import PAGE_SIZE, UaddrRange

_libc = ctypes.CDLL(None)
_libc.memchr.argtypes = (ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t)
HUGE: Final = (4 << 30) // PAGE_SIZE
_forking = threading.Event()


# ------------------------------------------------ watching


def sweeps(vmm: LiveVmm, page_count: int, *, watched: bool, of_a_file: bool) -> list[float]:
    """Touch every page of new mappings for the first time: read a cached memfd, or write anonymous memory."""
    file = -1
    if of_a_file:
        file = os.memfd_create("swept")
        os.truncate(file, page_count * PAGE_SIZE)
        for page in range(page_count):
            os.pwrite(file, b"\0", page * PAGE_SIZE)
    return [_sweep(vmm, page_count, file, watched=watched) for _ in range(7)]


def _sweep(vmm: LiveVmm, page_count: int, file: int, *, watched: bool) -> float:
    uaddrs = vmm.map(page_count, file=file)
    vmm.add_region(GFN, uaddrs)
    if watched:
        vmm.fault(GFN)
    began = time.perf_counter()
    if file >= 0:
        _libc.memchr(uaddrs.start_uaddr, 1, uaddrs.length)
    else:
        ctypes.memset(uaddrs.start_uaddr, 1, uaddrs.length)
    took = time.perf_counter() - began
    vmm.remove_region(GFN, uaddrs)
    libc.munmap(uaddrs)
    return took


def munmaps(vmm: LiveVmm, page_count: int, *, watched: bool) -> list[float]:
    """Unmap page by page from the end."""
    uaddrs = vmm.map(page_count)
    vmm.add_region(GFN, uaddrs)
    if watched:
        vmm.fault(GFN)
    took = []
    for page in range(uaddrs.end, uaddrs.start, -1):
        part = UaddrRange(start=page - 1, end=page)
        began = time.perf_counter()
        libc.munmap(part)
        took.append(time.perf_counter() - began)
    vmm.remove_region(GFN, uaddrs)
    return took


# ------------------------------------------------ forking


def become_huge(vmm: LiveVmm) -> None:
    """4 GiB of memory that is really there, in pages of 4 KiB, which a fork has to copy the tables of."""
    uaddrs = libc.mmap(UaddrRange.of_pages(0, HUGE), RW, Sharing.PRIVATE)
    ctypes.memset(uaddrs.start_uaddr, 1, uaddrs.length)
    vmm.mapped.append(uaddrs)


def fork_in_a_loop(_: LiveVmm) -> int:
    """Until `stop_forking`; returns how often."""
    count = 0
    _forking.set()
    while _forking.is_set():
        child = os.fork()
        if not child:
            os._exit(0)
        os.waitpid(child, 0)
        count += 1
    return count


def fault_anew_in_a_loop(vmm: LiveVmm) -> int:
    """Have the daemon ask about this memory until `stop_forking`; returns how often."""
    _forking.wait()
    uaddrs = vmm.mapped[-1]
    vmm.add_region(GFN, uaddrs)
    count = 0
    while _forking.is_set():
        with vmm.notifier.invalidation(uaddrs):
            pass
        vmm.fault(GFN)
        count += 1
    return count


def stop_forking(_: LiveVmm) -> None:
    _forking.clear()


def latencies_us(vmm: LiveVmm, count: int) -> tuple[float, float]:
    """Median and 99th percentile of an intercept whose memory was just invalidated: resolved and mapped."""
    uaddrs = vmm.map(16)
    vmm.add_region(2 * GFN, uaddrs)
    vp, message = vmm.open_vp(0), intercept_message(2 * GFN, READ)

    def once() -> None:
        vp.intercept(message)

    took = []
    for _ in range(count):
        with vmm.notifier.invalidation(uaddrs):
            pass
        took.append(_timed(once))
    vmm.remove_region(2 * GFN, uaddrs)
    cuts = quantiles(took, n=100)
    return cuts[49] * 1e6, cuts[98] * 1e6


def _timed(act: Callable[[], None]) -> float:
    began = time.perf_counter()
    act()
    return time.perf_counter() - began
