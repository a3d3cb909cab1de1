"""Memory in live mode: this process's own mappings, changed by the system calls that a VMM would use.

Owns one sparse file, each page of which is mapped at most once, so that an old frame can be recognised; and
wraps each change in begin and end. Must not know regions or guests.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Final

from intercept_client import TrioNotifier, TrioVmm, libc
from intercept_client.memory import Watch, own_memory
from intercept_protocol.addresses import PAGE_SHIFT, UaddrRange
from intercept_protocol.outcomes import Access

from .layout import MEMORIES
from .link import Link
from .truth import Truth
from .world import Backing, Frame

MAP_FIXED_NOREPLACE: Final = 0x100000
"""include/uapi/asm-generic/mman-common.h: existing mappings make it fail instead of being replaced."""


class LiveMemory:
    """See `Memory`. None of it is VM_IO, which takes a device driver, so `io` is ignored."""

    def __init__(self, link: Link, notifier: TrioNotifier, truth: Truth, file: int) -> None:
        self._link = link
        self._notifier = notifier
        self._truth = truth
        self._file = file
        status = os.fstat(file)
        device = f"{os.major(status.st_dev)}:{os.minor(status.st_dev)}"
        self._backing = f"file {device}:{status.st_ino}"
        self._next_page = 0

    async def map(self, uaddrs: UaddrRange, access: Access, *, io: bool) -> None:  # noqa: ARG002 - see the class
        first = Backing(Frame(self._backing, self._next_page), access, io=False)
        self._next_page += uaddrs.page_count + 1  # the gap keeps adjacent VMAs from merging
        os.ftruncate(self._file, self._next_page << PAGE_SHIFT)

        async def map_now() -> None:
            libc.mmap(
                uaddrs,
                access,
                libc.Sharing.SHARED,
                flags=MAP_FIXED_NOREPLACE,
                file=self._file,
                offset=first.frame.page << PAGE_SHIFT,
            )

        await self._link.perform(map_now, partial(self._truth.ask_map, uaddrs, first))

    async def unmap(self, uaddrs: UaddrRange) -> None:
        unmap_now = partial(libc.munmap, uaddrs)
        await self._link.perform(
            partial(self._announced, uaddrs, unmap_now), partial(self._truth.ask_unmap, uaddrs)
        )

    async def protect(self, uaddrs: UaddrRange, access: Access) -> None:
        def protect_now() -> None:
            for part in _without(uaddrs, self._truth.gaps(uaddrs)):  # mprotect fails at a hole
                libc.mprotect(part, access)

        await self._link.perform(
            partial(self._announced, uaddrs, protect_now), partial(self._truth.ask_protect, uaddrs, access)
        )

    async def _announced(self, uaddrs: UaddrRange, change: Callable[[], None]) -> None:
        async with self._notifier.invalidation(uaddrs):
            change()


@contextmanager
def arena() -> Iterator[int]:
    """The file whose pages are mapped; remaining mappings are removed with it."""
    file = os.memfd_create("interceptctl-exercise")
    try:
        yield file
    finally:
        os.close(file)
        for memory in MEMORIES:
            libc.munmap(memory.uaddrs)


async def attach(client: TrioVmm) -> None:
    """Give the daemon access to this process's memory, and let it watch it where permitted."""
    with own_memory(Watch.IF_POSSIBLE) as memory:
        await client.attach_memory(memory, promise_begin_end=True)


def _without(uaddrs: UaddrRange, gaps: list[UaddrRange]) -> Iterator[UaddrRange]:
    start = uaddrs.start
    for gap in [*gaps, UaddrRange(start=uaddrs.end, end=uaddrs.end)]:
        if start < gap.start:
            yield UaddrRange(start=start, end=gap.start)
        start = gap.end
