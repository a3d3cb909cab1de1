"""The kernel as the hypervisor of a restored guest: to map is to bring a missing page in.

Owns the order of an edit (the kernel first, then the table) and what each refusal of the kernel means. Must
not know why a page is brought in, nor where its bytes come from.
"""

from __future__ import annotations

import errno
from collections.abc import Sequence
from typing import Protocol

import trio

from intercept_protocol.addresses import GfnRange, UaddrRange
from interceptd.hypervisor import HypervisorCounters, HypervisorError
from interceptd.hypervisor.slat import SoftwareSlat
from interceptd.ledger.journal import Journal
from interceptd.pages.mapping import Mapping


class MemoryChanging(HypervisorError):
    """The VMM is changing its memory, or what was to be brought in is not at hand any more: nothing was
    decided, try again a little later."""

    def __init__(self, message: str, *, done: int = 0) -> None:
        super().__init__(errno.EAGAIN, message, done=done)


class Missing(Protocol):
    """The userfaultfd (`address_space/missing_faults.py`)."""

    def copy(self, page: int, source: int, count: int) -> None: ...
    def zero(self, page: int, count: int) -> None: ...
    def wake(self, uaddrs: UaddrRange) -> None: ...
    def unregister(self, uaddrs: UaddrRange) -> None: ...


class ImageBytes(Protocol):
    """The image (`address_space/image.py`)."""

    def read_nowait(self, page: int, count: int) -> int | None: ...


class UserfaultfdHypervisor:
    """See `Hypervisor`."""

    pieces_per_call = 512

    def __init__(self, uffd: Missing, image: ImageBytes, journal: Journal | None = None) -> None:
        self._uffd = uffd
        self._image = image
        self.table = SoftwareSlat(journal)
        self.all_in = trio.Event()
        """Set once no page is missing."""

    @property
    def may_block(self) -> bool:
        return False

    async def map_gpas(self, mappings: Sequence[Mapping]) -> None:
        raise NotImplementedError

    async def unmap_gpas(self, ranges: Sequence[GfnRange]) -> None:
        for gfns in ranges:
            self.table.clear(gfns)

    def translate(self, gfn: int) -> Mapping | None:
        entry = self.table.entry(gfn)
        return entry if entry is not None and entry.access else None

    def wake(self, uaddrs: UaddrRange) -> None:
        """Let all threads go on that wait for these pages."""
        self._uffd.wake(uaddrs)

    async def unregister(self, uaddrs: UaddrRange) -> None:
        """Leave the pages to the kernel, once all are in. Blocks for the VMM's mmap lock, in a worker."""
        raise NotImplementedError

    async def discard(self) -> None:
        await self.table.discard()

    def counters(self) -> HypervisorCounters:
        return HypervisorCounters(
            mapped_gfns=self.table.gfn_count - self.table.no_access_gfns,
            no_access_gfns=self.table.no_access_gfns,
            slat_extents=len(self.table),
        )
