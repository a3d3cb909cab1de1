"""The memory image of a snapshot as an address space: what stands behind a page of a restored guest.

Owns the image's descriptor, how its bytes are read without waiting for a disk or a file server, and which
pages the VMM has given back, behind which there are zeroes from then on. Must not know userfaultfds, regions
or gfns.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

import msgspec
import trio

from intercept_protocol.addresses import UaddrRange
from intercept_protocol.messages import MemoryWatch
from interceptd.address_space import Caller
from interceptd.address_space.refusals import Cause
from interceptd.address_space.workers import Workers
from interceptd.pages.mapping import Extent
from interceptd.telemetry.trace import Trace

IMAGE_BACKING = "image"
"""The backing of what comes from the image: `page` is a page of it."""
ZERO_BACKING = "zero"
"""The backing of what the VMM has given back: `page` is the page of the VMM."""


class ImagePart(msgspec.Struct, frozen=True, gc=False):
    """Pages [start, end) of the VMM that hold the image from `image_page` on, in pages of `unit` times 4 KiB
    (512 for huge pages)."""

    start: int
    end: int
    image_page: int
    unit: int = 1

    def slice(self, start: int, end: int) -> ImagePart:
        return ImagePart(start, end, self.image_page + start - self.start, self.unit)


class Image:
    """Owns the descriptor. Raises `OSError` if its size or file system cannot be told. The constructor asks
    the file system: for a worker."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self.pages = 0

    def read_nowait(self, page: int, count: int) -> int | None:
        """The address of so many pages' bytes, good until the next call; None if not all are in the page
        cache."""
        raise NotImplementedError

    def read(self, page: int, count: int) -> None:
        """In a worker: bring the pages into the page cache. Raises `OSError`, EIO at the end of the file."""
        raise NotImplementedError

    def detach(self) -> int:
        """Give up the descriptor, which is the caller's to close."""
        descriptor, self._descriptor = self._descriptor, -1
        return descriptor


class ImageAddressSpace:
    """See `AddressSpace`. `on_failure` is told each time that the image could not be read."""

    def __init__(
        self, image: Image, workers: Workers, on_failure: Callable[[OSError], None] = lambda _: None
    ) -> None:
        self._image = image
        self._workers = workers
        self._on_failure = on_failure
        self.known = self
        self.unresolved: Counter[Cause] = Counter()
        self.trace: Trace | None = None
        self.removed_pages = 0
        self.failures = 0
        self.vmm_gone = trio.Event()

    may_block = True
    watch = MemoryWatch.DECLARED
    userfaultfd_errno = None

    @property
    def vma_count(self) -> int:
        return 0

    def adopt(self, parts: Sequence[ImagePart]) -> None:
        """Serve these parts of the VMM's memory, which do not overlap."""
        raise NotImplementedError

    def removed(self, uaddrs: UaddrRange) -> None:
        """The VMM has given these pages back: there are zeroes behind them. Call it in the step in which that
        is announced to the notifier."""
        raise NotImplementedError

    async def resolve(
        self, page: int, window: UaddrRange, region: UaddrRange, caller: Caller = Caller.GUEST
    ) -> Extent | None:
        raise NotImplementedError

    async def is_io(self, page: int, caller: Caller = Caller.GUEST) -> bool | None:  # noqa: ARG002
        return False

    def drain_nowait(self) -> bool:
        return True

    def find(self, page: int, window: UaddrRange) -> Extent | None:
        raise NotImplementedError

    def learn(self, extent: Extent) -> None:
        """Nothing: what is behind a page is known anyway."""

    def forget(self, uaddrs: UaddrRange) -> None:
        """Nothing, see `learn`."""

    async def run(self) -> None:
        """Return once the VMM's memory is gone."""
        await self.vmm_gone.wait()

    def close(self) -> None:
        """End the worker threads. The descriptor is closed by who has it (`Image.detach`)."""
        self._workers.close()

    async def discard(self) -> None:
        """Free what is known of an ended partition, and let others run meanwhile."""
