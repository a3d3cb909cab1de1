"""The memory of a snapshot as an address space: what stands behind a page of a restored guest.

Owns which part of the image each page of the VMM holds, and which pages the VMM has given back: behind those
there are zeroes from then on. Must not know userfaultfds, regions or gfns.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial

import msgspec
import trio

from intercept_protocol.addresses import UaddrRange
from intercept_protocol.messages import MemoryWatch
from intercept_protocol.outcomes import Access
from interceptd.address_space import Caller, Undecided
from interceptd.address_space.fault_causes import FaultCauses
from interceptd.address_space.image_file import Image
from interceptd.address_space.refusals import Cause, error_name
from interceptd.address_space.workers import Workers
from interceptd.pages.counted_range_map import CountedRangeMap
from interceptd.pages.mapping import IMAGE_BACKING, ZERO_BACKING, Extent, Frame
from interceptd.pages.range_map import RangeMap, add_pages
from interceptd.quota import Quota
from interceptd.scheduling.time_share import give_way, give_way_shielded

_RIGHTS = Access.READ | Access.WRITE | Access.EXECUTE
REMOVED_PER_PART = 64
"""Runs of what was given back that a walk looks at before it lets others run."""
READS = 3
"""Times that one question has a page read that is not in the page cache afterwards."""


class ImagePart(msgspec.Struct, frozen=True, gc=False):
    """Pages [start, end) of the VMM that hold the image from `image_page` on."""

    start: int
    end: int
    image_page: int

    def slice(self, start: int, end: int) -> ImagePart:
        return ImagePart(start, end, self.image_page + start - self.start)


class ImageAddressSpace:
    """See `AddressSpace`. Its pages come in units of `unit` times 4 KiB (512 for huge pages).

    `quota` counts the runs of removed pages. `on_failure` is called for each failed read of the image.
    It is its own `known`, too: what stands behind a page is always known, and only its bytes may take time.
    """

    def __init__(
        self,
        image: Image,
        workers: Workers,
        parts: Sequence[ImagePart],
        *,
        quota: Quota,
        unit: int = 1,
        on_failure: Callable[[OSError], None] = lambda _: None,
    ) -> None:
        self._image = image
        self._workers = workers
        self._unit = unit
        self._on_failure = on_failure
        self._parts: RangeMap[ImagePart] = RangeMap()
        for part in parts:
            self._parts.insert(part)
        self._quota = quota
        self._removed: RangeMap[UaddrRange] = CountedRangeMap(quota)
        self._causes = FaultCauses()
        self.failures = 0
        """Reads of the image that failed."""
        self.is_failing = False
        """Whether the last one did."""
        self.vmm_gone = trio.Event()
        """Set it when the VMM's memory is gone."""

    may_block = True
    learns = False
    watch = MemoryWatch.USERFAULTFD
    userfaultfd_errno = None

    @property
    def known(self) -> ImageAddressSpace:
        return self

    @property
    def vma_count(self) -> int:
        """What is recorded: parts of the image, and runs of what was given back."""
        return len(self._parts) + len(self._removed)

    @property
    def removed_pages(self) -> int:
        """Pages that the VMM has given back, at any time."""
        return self._removed.page_count

    @property
    def unresolved(self) -> Counter[Cause]:
        return self._causes.counts

    def removed(self, uaddrs: UaddrRange) -> None:
        """The VMM has given these pages back: there are zeroes behind them. Call it in the step in which that
        is announced to the notifier, whatever the limits are. Other memory of the VMM is passed over."""
        for part in self._parts.clipped(uaddrs):
            add_pages(self._removed, UaddrRange(start=part.start, end=part.end))

    def first_removed(self, uaddrs: UaddrRange) -> UaddrRange:
        """The first part of `uaddrs`, perhaps all, of which `removed` can be told in one step."""
        part = self._removed.head(uaddrs, REMOVED_PER_PART)
        return UaddrRange(start=part.start, end=part.end)

    def require_room(self) -> None:
        """Raise ENOSPC if the VMM may give back no more pieces than it has."""
        self._quota.require(1)

    def image_runs(self, uaddrs: UaddrRange) -> list[UaddrRange]:
        """The parts of `uaddrs` that were not given back."""
        return [UaddrRange(start=start, end=end) for start, end in self._removed.gaps(uaddrs)]

    async def image_pages(self, uaddrs: UaddrRange) -> int:
        """How many pages of `uaddrs` were not given back. Lets others run meanwhile."""
        count, rest = 0, uaddrs
        while rest.page_count:
            part = self._removed.head(rest, REMOVED_PER_PART)
            count += sum(end - start for start, end in self._removed.gaps(part))
            rest = UaddrRange(start=part.end, end=rest.end)
            await give_way()
        return count

    def drain_nowait(self) -> bool:
        """True: where something was given back that is not announced yet, the kernel lets nothing in."""
        return True

    def find(self, page: int, window: UaddrRange) -> Extent | None:
        """See `Known.find`: the pages around `page` whose bytes are at hand, or that are zero."""
        part = self._parts.find(page)
        if part is None:
            return None
        extent = self._run(part, page, window)
        return extent if extent.frame.backing == ZERO_BACKING else self._at_hand(extent, page)

    def learn(self, extent: Extent) -> None:
        """Does nothing, and so does `forget`: what is behind a page is known anyway."""

    def forget(self, uaddrs: UaddrRange) -> None:
        pass

    async def resolve(
        self,
        page: int,
        window: UaddrRange,
        region: UaddrRange,  # noqa: ARG002 - for address spaces that watch VMAs
        caller: Caller = Caller.GUEST,  # noqa: ARG002 - the VMM asks nothing
    ) -> Extent | None:
        """See `AddressSpace.resolve`: has the bytes read that are not at hand, by a worker, for as long as
        the image takes. Raises `Undecided` if it cannot be read."""
        part = self._parts.find(page)
        if part is None:
            return None
        for _ in range(READS):
            if (extent := self.find(page, window)) is not None:
                return extent
            run = self._run(part, page, window)
            try:
                read = await self._workers.ask(
                    partial(self._image.read, run.frame.page, run.uaddrs.page_count)
                )
            except OSError as error:
                raise self._failed(error) from error
            self._image.keep(read)
            self.is_failing = False
        extent = self.find(page, window)
        if extent is None:
            raise Undecided.because(Cause.CHANGING)
        return extent

    async def is_io(self, page: int, caller: Caller = Caller.GUEST) -> bool | None:  # noqa: ARG002 - as above
        return None if self._parts.find(page) is None else False

    async def run(self) -> None:
        """Return once the VMM's memory is gone."""
        await self.vmm_gone.wait()

    def close(self) -> None:
        """End the worker threads, and close the image."""
        self._workers.close()
        self._image.close()

    async def discard(self) -> None:
        """Free what is known of an ended partition, and let others run meanwhile."""
        while self._removed.drop_some():
            await give_way_shielded()

    def _run(self, part: ImagePart, page: int, window: UaddrRange) -> Extent:
        """All of the part and the window around the page that is of one kind."""
        start, end = max(window.start, part.start), min(window.end, part.end)
        whole = UaddrRange(start=part.start, end=part.end)
        if self._removed:
            zeroes = self._removed.find(page)
            if zeroes is not None:
                start, end = max(start, zeroes.start), min(end, zeroes.end)
                uaddrs = UaddrRange(start=start, end=end)
                return Extent(uaddrs, Frame(ZERO_BACKING, start), _RIGHTS, False, whole)
            start, end = next(
                (first, last)
                for first, last in self._removed.gaps(UaddrRange(start=start, end=end))
                if first <= page < last
            )
        frame = Frame(IMAGE_BACKING, part.image_page + start - part.start)
        return Extent(UaddrRange(start=start, end=end), frame, _RIGHTS, False, whole)

    def _at_hand(self, extent: Extent, page: int) -> Extent | None:
        """The part of the extent around the page whose bytes can be had now: all, those before the first page
        that is not there, or those from the page on."""
        first, start, end = extent.frame.page, extent.start, extent.end
        count = self._image.resident(first, end - start)
        if count == end - start:
            return extent
        count -= count % self._unit
        if page < start + count:
            return extent.slice(start, start + count)
        start = page - (page - start) % self._unit
        count = self._image.resident(first + start - extent.start, end - start)
        count -= count % self._unit
        return extent.slice(start, start + count) if page < start + count else None

    def _failed(self, error: OSError) -> Undecided:
        self.failures += 1
        self.is_failing = True
        self._on_failure(error)
        reason = Undecided.because(Cause.IMAGE_ERROR, error_name(error))
        self._causes.undecided(reason)
        return reason
