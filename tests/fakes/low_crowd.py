"""Many small VMAs at the lowest addresses of this process, so that its maps file begins with them.

Owns mapping and unmapping them. Must not know who reads the file.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from fakes.live_vmm import MAP_FIXED_NOREPLACE, RW
from intercept_client import libc
from intercept_client.libc import Sharing
from intercept_protocol.addresses import PAGE_SIZE, UaddrRange
from intercept_protocol.outcomes import Access

FIRST: Final = 0x20
"""A page that can be unmapped: above any vm.mmap_min_addr, below any program."""
CROWD: Final = 0x30
COUNT: Final = 200
LONG_NAME: Final = "n" * 211
"""The line that it is in is as long as no number of the others together."""


def crowd() -> list[UaddrRange]:
    """The VMAs, of which every other has rights: 45 bytes each in the maps file, 89 in a piece of it."""
    return [UaddrRange(start=page, end=page + 1) for page in range(CROWD, CROWD + COUNT)]


@contextmanager
def low_crowd() -> Iterator[list[UaddrRange]]:
    file = os.memfd_create(LONG_NAME)
    os.ftruncate(file, PAGE_SIZE)
    first, whole = UaddrRange(start=FIRST, end=FIRST + 1), UaddrRange(start=CROWD, end=CROWD + COUNT)
    libc.mmap(first, RW, Sharing.SHARED, flags=MAP_FIXED_NOREPLACE, file=file)
    libc.mmap(whole, Access.NONE, Sharing.PRIVATE, flags=MAP_FIXED_NOREPLACE)
    for page in range(CROWD, CROWD + COUNT, 2):
        libc.mprotect(UaddrRange(start=page, end=page + 1), RW)
    os.close(file)
    yield crowd()
    libc.munmap(whole)
    libc.munmap(first)


def take_a_line_away() -> None:
    """Whatever comes behind it in the text moves to the front."""
    libc.munmap(UaddrRange(start=FIRST, end=FIRST + 1))
