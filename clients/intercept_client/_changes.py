"""The system calls that change mappings, as descriptions: what to announce, and what to do then.

Owns which ranges each call takes from the guest, once for both shells: `memory` and `trio_memory` make
functions of these. Must not know how an invalidation is carried out, nor wait for one.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import Enum
from functools import partial
from typing import Generic, TypeVar

from intercept_protocol.addresses import PAGE_SHIFT, Uaddr, UaddrRange
from intercept_protocol.outcomes import Access

from . import libc
from .libc import Sharing

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Change(Generic[T]):
    """`carry_out` is the system call; `announced` is what the guest must not reach meanwhile."""

    announced: tuple[UaddrRange, ...]
    carry_out: Callable[[], T]


class Leave(Enum):
    """What `mremap` leaves behind at the old place."""

    NOTHING = 0
    EMPTY_MAPPING = libc.Remap.DONTUNMAP


def munmap(uaddrs: UaddrRange) -> Change[None]:
    """Unmap `uaddrs`, once the guest cannot reach it any more."""
    return Change((uaddrs,), partial(libc.munmap, uaddrs))


def mremap(
    uaddrs: UaddrRange,
    page_count: int,
    *,
    start_uaddr: Uaddr | None = None,
    leave: Leave = Leave.NOTHING,
) -> Change[UaddrRange]:
    """Move, grow or shrink a mapping; returns where it is now: at `start_uaddr`, or where the kernel chose.

    What lies at `start_uaddr` is replaced, so it is announced too. A place that the kernel chooses had
    nothing mapped, so the guest reaches nothing there.
    """
    flags = libc.Remap.MAYMOVE | leave.value
    if start_uaddr is None:
        return Change((uaddrs,), partial(libc.mremap, uaddrs, page_count << PAGE_SHIFT, flags))
    target = UaddrRange.of_pages(start_uaddr, page_count)
    flags |= libc.Remap.FIXED
    return Change((uaddrs, target), partial(libc.mremap, uaddrs, target.length, flags, target.start_uaddr))


def mprotect(uaddrs: UaddrRange, access: Access) -> Change[None]:
    """Change the rights of a mapping.

    The kernel reports no event for it, so the guest loses rights in time only if it is announced.
    """
    return Change((uaddrs,), partial(libc.mprotect, uaddrs, access))


def madvise(uaddrs: UaddrRange, advice: int) -> Change[None]:
    """Advise the kernel; `advice` is one of `mmap.MADV_*`."""
    return Change((uaddrs,), partial(libc.madvise, uaddrs, advice))


def map_fixed(
    uaddrs: UaddrRange, access: Access, sharing: Sharing, *, file: int = -1, offset: int = 0
) -> Change[None]:
    """Replace whatever is mapped at `uaddrs` (MAP_FIXED) by a part of `file`, or by new anonymous memory.

    `file` is a descriptor, and `offset` is in bytes.
    """

    def carry_out() -> None:
        libc.mmap(uaddrs, access, sharing, flags=libc.MAP_FIXED, file=file, offset=offset)

    return Change((uaddrs,), carry_out)


def fallocate_punch_hole(
    file: int, offset: int, length: int, mapped_at: Iterable[UaddrRange]
) -> Change[None]:
    """Free a part of `file`, in bytes; `mapped_at` is where this process has that part mapped."""
    return Change(tuple(mapped_at), partial(libc.punch_hole, file, offset, length))


def ftruncate(file: int, length: int, mapped_at: Iterable[UaddrRange]) -> Change[None]:
    """Cut `file` off at `length` bytes; `mapped_at` is where this process has the part beyond it mapped."""
    return Change(tuple(mapped_at), partial(os.ftruncate, file, length))
