"""Changing the VMM's own mappings without leaving the guest a window on what was there.

Owns the system calls that change mappings, each wrapped in an invalidation: begin, the call, end. A range
whose `begin` failed is not touched, and a call that fails still ends. Must not know how an invalidation is
carried out.

Each raises the `OSError` of the system call, or what `BlockingNotifier.invalidation` raises: from a begin,
with the mappings untouched; from an end, with the change made. Whatever Python objects look into a range must
be gone before it is, as with the bare calls.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from enum import Enum

from intercept_protocol.addresses import PAGE_SHIFT, Uaddr, UaddrRange
from intercept_protocol.outcomes import Access

from . import libc
from ._blocking_clients import BlockingNotifier
from ._own_memory import OwnMemory, Watch, own_memory
from ._userfaultfd import (
    Permission,
    UserfaultfdNotPermitted,
    UserfaultfdNotSupported,
    UserfaultfdUnavailable,
    open_userfaultfd,
)
from .libc import Sharing

__all__ = [
    "Leave", "OwnMemory", "Permission", "Sharing", "UserfaultfdNotPermitted", "UserfaultfdNotSupported",
    "UserfaultfdUnavailable", "Watch", "fallocate_punch_hole", "ftruncate", "madvise", "map_fixed",
    "mprotect", "mremap", "munmap", "open_userfaultfd", "own_memory",
]  # fmt: skip


class Leave(Enum):
    """What `mremap` leaves behind at the old place."""

    NOTHING = 0
    EMPTY_MAPPING = libc.Remap.DONTUNMAP


def munmap(notifier: BlockingNotifier, uaddrs: UaddrRange) -> None:
    """Unmap `uaddrs`; blocks until the guest cannot reach it any more, then unmaps."""
    with notifier.invalidation(uaddrs):
        libc.munmap(uaddrs)


def mremap(
    notifier: BlockingNotifier,
    uaddrs: UaddrRange,
    page_count: int,
    *,
    start_uaddr: Uaddr | None = None,
    leave: Leave = Leave.NOTHING,
) -> UaddrRange:
    """Move, grow or shrink a mapping; returns where it is now: at `start_uaddr`, or where the kernel likes.

    What lies at `start_uaddr` is replaced, so it is announced too. A place that the kernel chooses had
    nothing mapped, so the guest reaches nothing there.
    """
    flags = libc.Remap.MAYMOVE | leave.value
    if start_uaddr is None:
        with notifier.invalidation(uaddrs):
            return libc.mremap(uaddrs, page_count << PAGE_SHIFT, flags)
    target = UaddrRange.of_pages(start_uaddr, page_count)
    with _invalidations(notifier, (uaddrs, target)):
        return libc.mremap(uaddrs, target.length, flags | libc.Remap.FIXED, target.start_uaddr)


def mprotect(notifier: BlockingNotifier, uaddrs: UaddrRange, access: Access) -> None:
    """Change the rights; no event tells of it, so only this way does the guest lose what it may no longer."""
    with notifier.invalidation(uaddrs):
        libc.mprotect(uaddrs, access)


def madvise(notifier: BlockingNotifier, uaddrs: UaddrRange, advice: int) -> None:
    """`advice` is one of `mmap.MADV_*`."""
    with notifier.invalidation(uaddrs):
        libc.madvise(uaddrs, advice)


def map_fixed(
    notifier: BlockingNotifier,
    uaddrs: UaddrRange,
    access: Access,
    sharing: Sharing,
    *,
    file: int = -1,
    offset: int = 0,
) -> None:
    """Replace whatever is mapped at `uaddrs` (MAP_FIXED) by a part of `file`, or by new anonymous memory."""
    with notifier.invalidation(uaddrs):
        libc.mmap(uaddrs, access, sharing, flags=libc.MAP_FIXED, file=file, offset=offset)


def fallocate_punch_hole(
    notifier: BlockingNotifier, file: int, offset: int, length: int, mapped_at: Iterable[UaddrRange]
) -> None:
    """Free a part of `file`, which this process has mapped at `mapped_at`: no other call says where."""
    with _invalidations(notifier, mapped_at):
        libc.punch_hole(file, offset, length)


def ftruncate(notifier: BlockingNotifier, file: int, length: int, mapped_at: Iterable[UaddrRange]) -> None:
    """Cut `file` off at `length` bytes; `mapped_at` is where the part behind is mapped."""
    with _invalidations(notifier, mapped_at):
        os.ftruncate(file, length)


@contextmanager
def _invalidations(notifier: BlockingNotifier, ranges: Iterable[UaddrRange]) -> Iterator[None]:
    """Begin each in turn; each that began ends, also when a later one is refused."""
    with ExitStack() as begun:
        for uaddrs in ranges:
            begun.enter_context(notifier.invalidation(uaddrs))
        yield
