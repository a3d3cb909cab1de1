"""A VMM that takes its memory apart page by page, as fast as several threads can."""

from __future__ import annotations

import mmap

from fakes.live_vmm import LiveVmm
from intercept_client import libc
from intercept_client.memory import Watch
from intercept_protocol.addresses import UaddrRange


def attach_and_map(vmm: LiveVmm, start_gfn: int, page_count: int) -> None:
    """One watched VMA, all of which the guest has touched."""
    vmm.attach(Watch.REQUIRED, promise=False)
    uaddrs = vmm.map(page_count)
    vmm.add_region(start_gfn, uaddrs)
    for gfn in range(start_gfn, start_gfn + page_count, 512):
        vmm.fault(gfn)


def discard_and_unmap(vmm: LiveVmm, share: int, shares: int) -> int:
    """Page by page from the end, which leaves few VMAs; returns how many system calls it were."""
    uaddrs = vmm.mapped[-1]
    size = uaddrs.page_count // shares
    start = uaddrs.start + share * size
    for page in range(start + size, start, -1):
        libc.madvise(UaddrRange(start=page - 1, end=page), mmap.MADV_DONTNEED)
        libc.munmap(UaddrRange(start=page - 1, end=page))
    return 2 * size
