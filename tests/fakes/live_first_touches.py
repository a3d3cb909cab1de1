"""All VPs of a VMM touch memory of very many VMAs for the first time, at once.

Owns the memory, its regions and the touches. Must not know which answers are right.
"""

from __future__ import annotations

import threading
from collections import Counter
from typing import Final

from fakes.live_vmm import GFN, RW, LiveVmm
from fakes.raw_client import READ
from intercept_client import libc
from intercept_client.libc import Sharing
from intercept_protocol.addresses import PAGE_SIZE, UaddrRange
from intercept_protocol.outcomes import Access, AnyAnswer

VPS: Final = 8
LOW: Final = 0x8_0000_0000 // PAGE_SIZE
"""A page below all memory that these VMMs map."""
PAGES: Final = 2
"""Of each VMA."""


def add_regions_of_vmas(vmm: LiveVmm, vma_count: int, region_count: int) -> None:
    """Regions of kind auto, each of as many whole VMAs; neighbours differ in their rights."""
    memory = vmm.map(PAGES * vma_count)
    for vma in _parts(memory, vma_count)[::2]:
        libc.mprotect(vma, RW & Access.READ)
    for region in _parts(memory, region_count):
        vmm.add_region(GFN + region.start - memory.start, region, "auto")


def touch_all_at_once(vmm: LiveVmm, vma_count: int) -> Counter[AnyAnswer]:
    """Each VP touches every eighth VMA, the last ones first where its number is odd, while the VMM changes
    memory that is in no region."""
    answers: Counter[AnyAnswer] = Counter()
    together = threading.Barrier(VPS)

    def play(vp_index: int) -> None:
        vmas = range(vp_index, vma_count, VPS)
        vmm.open_vp(vp_index)
        together.wait()
        for vma in reversed(vmas) if vp_index % 2 else vmas:
            answers[vmm.fault(GFN + PAGES * vma, READ, vp_index)] += 1

    threads = [threading.Thread(target=play, args=(vp_index,)) for vp_index in range(VPS)]
    over = threading.Event()
    churning = threading.Thread(target=_churn, args=(over,))
    for thread in (churning, *threads):
        thread.start()
    for thread in threads:
        thread.join()
    over.set()
    churning.join()
    return answers


def _churn(over: threading.Event) -> None:
    """Map and unmap what lies before the memory and in no region: the text of smaps moves behind it."""
    while not over.is_set():
        for size in range(2, 40, 2):
            low = libc.mmap(
                UaddrRange(start=LOW, end=LOW + size), Access.NONE, Sharing.PRIVATE, flags=libc.MAP_FIXED
            )
            for page in range(low.start, low.end, 2):
                libc.mprotect(UaddrRange(start=page, end=page + 1), Access.READ)
            libc.munmap(low)


def announce_all(vmm: LiveVmm) -> None:
    """Forget all mappings and records."""
    with vmm.notifier.invalidation(vmm.mapped[-1]):
        pass


def _parts(memory: UaddrRange, count: int) -> list[UaddrRange]:
    size = memory.page_count // count
    return [UaddrRange(start=start, end=start + size) for start in range(memory.start, memory.end, size)]
