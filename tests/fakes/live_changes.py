"""The ways in which a process changes its memory, each bare and announced by the client library.

Owns what is done to pages 4 to 8 of `Memory` (to its end where a call cuts one off). Must not know what comes
of it.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Final

from fakes import silent_calls
from fakes.live_vmm import RW, LiveVmm, Memory
from intercept_client import libc, memory
from intercept_client.libc import Remap, Sharing
from intercept_protocol.addresses import PAGE_SIZE, UaddrRange
from intercept_protocol.outcomes import Access

PAGES: Final = 16
FIRST, LAST = 4, 8
"""The part that is changed."""
OFFSET, LENGTH = FIRST * PAGE_SIZE, (LAST - FIRST) * PAGE_SIZE
MADV_COLLAPSE: Final = 25
"""include/uapi/asm-generic/mman-common.h (Linux 6.1)."""


def _part(changed: Memory) -> UaddrRange:
    return changed.part(FIRST, LAST)


# ------------------------------------------------ bare


def munmap(_: LiveVmm, changed: Memory) -> None:
    libc.munmap(changed.uaddrs)


def munmap_of_a_part(_: LiveVmm, changed: Memory) -> None:
    libc.munmap(_part(changed))


def map_fixed(vmm: LiveVmm, changed: Memory) -> None:
    vmm.map(LAST - FIRST, file=vmm.memfd(4, "other"), at=_part(changed))


def mremap_that_moves(vmm: LiveVmm, changed: Memory) -> None:
    to = vmm.free_space(LAST - FIRST)
    libc.mremap(_part(changed), LENGTH, Remap.MAYMOVE | Remap.FIXED, to.start_uaddr)


def mremap_over(vmm: LiveVmm, changed: Memory) -> None:
    source = vmm.map_memfd(LAST - FIRST, "other")
    libc.mremap(source.uaddrs, LENGTH, Remap.MAYMOVE | Remap.FIXED, _part(changed).start_uaddr)


def mremap_that_shrinks(_: LiveVmm, changed: Memory) -> None:
    libc.mremap(changed.uaddrs, OFFSET, Remap.MAYMOVE)


def mremap_dontunmap(vmm: LiveVmm, changed: Memory) -> None:
    to = vmm.free_space(LAST - FIRST)
    flags = Remap.MAYMOVE | Remap.FIXED | Remap.DONTUNMAP
    libc.mremap(_part(changed), LENGTH, flags, to.start_uaddr)


def madvise_dontneed(_: LiveVmm, changed: Memory) -> None:
    libc.madvise(_part(changed), mmap.MADV_DONTNEED)


def madvise_remove(_: LiveVmm, changed: Memory) -> None:
    libc.madvise(_part(changed), mmap.MADV_REMOVE)


def shm_remap(_: LiveVmm, changed: Memory) -> None:
    silent_calls.attach_segment_over(_part(changed))


def remap_file_pages(_: LiveVmm, changed: Memory) -> None:
    silent_calls.remap_file_pages(_part(changed), 0)


def mprotect(_: LiveVmm, changed: Memory) -> None:
    libc.mprotect(_part(changed), Access.READ)


def punch_hole(_: LiveVmm, changed: Memory) -> None:
    libc.punch_hole(changed.file, OFFSET, LENGTH)


def ftruncate(_: LiveVmm, changed: Memory) -> None:
    os.ftruncate(changed.file, OFFSET)


def copy_on_write(vmm: LiveVmm, changed: Memory) -> None:
    """The child has the old page, the parent a new one."""
    vmm.fork_and_reap(partial(vmm.write, _part(changed)))
    vmm.write(_part(changed))


def first_write_to_the_zero_page(vmm: LiveVmm, changed: Memory) -> None:
    libc.madvise(_part(changed), mmap.MADV_DONTNEED)
    vmm.touch(_part(changed))
    vmm.write(_part(changed))


def collapse_into_a_huge_page(_: LiveVmm, changed: Memory) -> None:
    start = -changed.uaddrs.start % 512 + changed.uaddrs.start
    libc.madvise(UaddrRange(start=start, end=start + 512), MADV_COLLAPSE)


def fork_whose_child_unmaps(vmm: LiveVmm, changed: Memory) -> None:
    vmm.fork_and_reap(partial(libc.munmap, changed.uaddrs))


# ------------------------------------------------ announced


def announced_munmap(vmm: LiveVmm, changed: Memory) -> None:
    memory.munmap(vmm.notifier, changed.uaddrs)


def announced_munmap_of_a_part(vmm: LiveVmm, changed: Memory) -> None:
    memory.munmap(vmm.notifier, _part(changed))


def announced_map_fixed(vmm: LiveVmm, changed: Memory) -> None:
    memory.map_fixed(vmm.notifier, _part(changed), RW, Sharing.SHARED, file=vmm.memfd(4, "other"))


def announced_mremap_that_moves(vmm: LiveVmm, changed: Memory) -> None:
    to = vmm.free_space(LAST - FIRST)
    memory.mremap(vmm.notifier, _part(changed), LAST - FIRST, start_uaddr=to.start_uaddr)


def announced_mremap_over(vmm: LiveVmm, changed: Memory) -> None:
    source = vmm.map_memfd(LAST - FIRST, "other")
    memory.mremap(vmm.notifier, source.uaddrs, LAST - FIRST, start_uaddr=_part(changed).start_uaddr)


def announced_mremap_that_shrinks(vmm: LiveVmm, changed: Memory) -> None:
    memory.mremap(vmm.notifier, changed.uaddrs, FIRST)


def announced_mremap_dontunmap(vmm: LiveVmm, changed: Memory) -> None:
    leave = memory.Leave.EMPTY_MAPPING
    memory.mremap(vmm.notifier, _part(changed), LAST - FIRST, leave=leave)


def announced_madvise_dontneed(vmm: LiveVmm, changed: Memory) -> None:
    memory.madvise(vmm.notifier, _part(changed), mmap.MADV_DONTNEED)


def announced_madvise_remove(vmm: LiveVmm, changed: Memory) -> None:
    memory.madvise(vmm.notifier, _part(changed), mmap.MADV_REMOVE)


def announced_shm_remap(vmm: LiveVmm, changed: Memory) -> None:
    with vmm.notifier.invalidation(_part(changed)):
        shm_remap(vmm, changed)


def announced_remap_file_pages(vmm: LiveVmm, changed: Memory) -> None:
    with vmm.notifier.invalidation(_part(changed)):
        remap_file_pages(vmm, changed)


def announced_mprotect(vmm: LiveVmm, changed: Memory) -> None:
    memory.mprotect(vmm.notifier, _part(changed), Access.READ)


def announced_punch_hole(vmm: LiveVmm, changed: Memory) -> None:
    memory.fallocate_punch_hole(vmm.notifier, changed.file, OFFSET, LENGTH, [_part(changed)])


def announced_ftruncate(vmm: LiveVmm, changed: Memory) -> None:
    memory.ftruncate(vmm.notifier, changed.file, OFFSET, [changed.part(FIRST, PAGES)])


# ------------------------------------------------ what the guest reaches meanwhile


@dataclass(frozen=True, slots=True)
class Glimpse:
    """The pages that the guest reached right before and right after a system call."""

    before: list[int]
    after: list[int]


SYSTEM_CALLS: Final = {
    libc: ("munmap", "mmap", "mremap", "mprotect", "madvise", "punch_hole"),
    os: ("ftruncate",),
    silent_calls: ("attach_segment_over", "remap_file_pages"),
}


def glimpses(
    vmm: LiveVmm, change: Callable[[LiveVmm, Memory], None], changed: Memory, start_gfn: int
) -> list[Glimpse]:
    """Make an announced change, and look at each system call that is made for it."""
    seen: list[Glimpse] = []
    look = partial(vmm.reached, start_gfn, changed.uaddrs.page_count)

    def watching(call: Callable[..., object]) -> Callable[..., object]:
        def watched(*arguments: object, **options: object) -> object:
            before = look()
            result = call(*arguments, **options)
            seen.append(Glimpse(before, look()))
            return result

        return watched

    with ExitStack() as undo:
        for module, names in SYSTEM_CALLS.items():
            for name in names:
                bare = getattr(module, name)
                undo.callback(setattr, module, name, bare)
                setattr(module, name, watching(bare))
        change(vmm, changed)
    return seen
