"""The kernel as the hypervisor of a restored guest: to map is to bring in what is missing.

Owns the order of an edit (the kernel first, then the table) and what each refusal of the kernel means. Must
not know why a page is brought in, nor who reads the image.

Between the moment in which it is decided what belongs behind a page and the ioctl no message may be read:
otherwise a page that was given back meanwhile gets its old content. The kernel refuses everything while a
REMOVE is not read (EAGAIN), so it suffices that a call is one step. Where it is none, because the ioctl is
made in a worker, the reader waits (`settled`).
"""

from __future__ import annotations

import errno
import resource
from collections.abc import Awaitable, Callable, Sequence
from contextvars import ContextVar
from functools import partial
from time import perf_counter_ns
from typing import Final, Protocol

import trio

from intercept_protocol.addresses import PAGE_SHIFT, GfnRange, UaddrRange
from interceptd.hypervisor import HypervisorCounters, HypervisorError, MemoryChanging
from interceptd.hypervisor.slat import SoftwareSlat
from interceptd.ledger.journal import Journal
from interceptd.pages.mapping import ZERO_BACKING, Mapping
from interceptd.telemetry.counters import PortCalls

SLOW_NS: Final = 2_000_000
"""An ioctl that took longer and slept has waited for the VMM's lock, or for memory: the next ones are a
worker's. One that did not sleep was only preempted, as by the guest that it woke."""
PATIENT_NS: Final = 10_000_000_000
"""For how long."""
PREFETCHING: ContextVar[bool] = ContextVar("prefetching", default=False)
"""Whether the running task brings in what no guest waits for."""


class Missing(Protocol):
    """The userfaultfd (`address_space/missing_faults.py`)."""

    def copy(self, page: int, source: int, count: int) -> int:
        """How many of the pages from the first on are in now, or the negative errno if none is."""

    def zero(self, page: int, count: int) -> int: ...

    def wake(self, uaddrs: UaddrRange) -> None: ...

    def unregister(self, uaddrs: UaddrRange) -> None: ...

    def in_worker(self, call: Callable[[], None]) -> Awaitable[None]:
        """Raises what `call` does, and `OSError` if there is no thread for it now."""


class Memory(Protocol):
    """Bytes, as long as it exists."""

    @property
    def address(self) -> int: ...


class ImageBytes(Protocol):
    """The image (`address_space/image_file.py`)."""

    def read_nowait(self, page: int, count: int) -> int | None: ...

    def read_apart(self, page: int, count: int) -> Memory | None: ...


class UserfaultfdHypervisor:
    """See `Hypervisor`. A mapping's frame says what is brought in: a page of the image, or zeroes.

    What the guest can access is what is in. A page may be in without an entry, which the kernel tells the
    next time (EEXIST), but none has an entry without being in: its guest would wait for ever.
    `unit` is the number of 4 KiB pages that the kernel brings in at least, 512 for huge pages.
    """

    pieces_per_call = 512
    """More than a fault's window has, so that a fault is one call."""

    def __init__(
        self,
        uffd: Missing,
        image: ImageBytes,
        journal: Journal | None = None,
        *,
        unit: int = 1,
        port_calls: PortCalls | None = None,
    ) -> None:
        self._uffd = uffd
        self._image = image
        self._unit = unit
        self._port_calls = PortCalls() if port_calls is None else port_calls
        self.table = SoftwareSlat(journal)
        self.may_block = False
        """See `Hypervisor.may_block`: while ioctls are a worker's."""
        self._patient_until = 0
        self._settled: trio.Event | None = None
        """While a worker makes an ioctl: set once it has."""
        self.vmm_gone = False
        """Whether the kernel says that there is no memory any more (ESRCH)."""
        self._map_calls = 0
        self.zeroed_pages = 0
        """Pages brought in that are zero. Here and below, a page that was removed and comes again counts
        again."""
        self.demanded_pages = 0
        """Pages that a guest waited for, and those around them."""
        self.prefetched_pages = 0

    async def map_gpas(self, mappings: Sequence[Mapping]) -> None:
        """See `Hypervisor.map_gpas`. Raises `MemoryChanging` too; of the piece that was refused some pages
        may be in then, without an entry."""
        if self.may_block:
            await self._map_patiently(mappings)
            return
        for done, mapping in enumerate(mappings):
            if mapping.access:
                self._map(mapping, done)
            else:
                self.table.replace(mapping)

    async def unmap_gpas(self, ranges: Sequence[GfnRange]) -> None:
        """See `Hypervisor.unmap_gpas`. The kernel took the pages away itself, or keeps them to its end."""
        for gfns in ranges:
            self.table.clear(gfns)

    def be_patient(self, for_ns: int) -> None:
        """Have a worker make the ioctls for so long."""
        self.may_block, self._patient_until = True, perf_counter_ns() + for_ns

    async def settled(self) -> None:
        """Block until no ioctl is under way: then messages may be read."""
        while self._settled is not None:
            await self._settled.wait()

    def translate(self, gfn: int) -> Mapping | None:
        entry = self.table.entry(gfn)
        return entry if entry is not None and entry.access else None

    async def bring_again(self, mapping: Mapping, gfn: int) -> None:
        """A guest waits for a page that has an entry. As a rule it was brought in meanwhile, and the guest
        need only look again. What was zero may be missing all the same: the kernel takes a page that is being
        removed away once that was read, even if it was brought in anew since. Raises `HypervisorError`."""
        gfn -= gfn % self._unit
        page = gfn - mapping.start + mapping.start_uaddr_page
        if self._is_zero(mapping):
            fill = partial(self._fill, page, None, self._unit, 0)
            if self.may_block:
                await self._in_worker(fill)
            else:
                fill()
        else:
            self.wake(UaddrRange(start=page, end=page + self._unit))

    def wake(self, uaddrs: UaddrRange) -> None:
        """Let all threads go on that wait for these pages."""
        self._uffd.wake(uaddrs)

    async def unregister(self, ranges: Sequence[UaddrRange]) -> None:
        """Leave these ranges to the kernel, which from now on fills with zeroes what is missing. Blocks for
        the VMM's mmap lock, in a worker. Raises `OSError`."""
        for uaddrs in ranges:
            await self._uffd.in_worker(partial(self._uffd.unregister, uaddrs))

    async def discard(self) -> None:
        await self.table.discard()

    def counters(self) -> HypervisorCounters:
        return HypervisorCounters(
            mapped_gfns=self.table.gfn_count - self.table.no_access_gfns,
            no_access_gfns=self.table.no_access_gfns,
            slat_extents=len(self.table),
            map_calls=self._map_calls,
        )

    def _map(self, mapping: Mapping, done: int) -> None:
        """Bring in and record, in one step."""
        count = mapping.end - mapping.start
        source = None
        if not self._is_zero(mapping):
            assert mapping.frame is not None, "only NO_ACCESS has none"
            source = self._image.read_nowait(mapping.frame.page, count)
            if source is None:
                raise _not_at_hand(done)
        slept, began = _sleeps(), perf_counter_ns()
        try:
            self._fill(mapping.start_uaddr_page, source, count, done)
        finally:
            took = perf_counter_ns() - began
            self._count(took)
            if took > SLOW_NS and _sleeps() > slept:
                self.be_patient(PATIENT_NS)
        self._record(mapping)

    async def _map_patiently(self, mappings: Sequence[Mapping]) -> None:
        """The same, with each ioctl in a worker."""
        self._settled = trio.Event()
        try:
            for done, mapping in enumerate(mappings):
                if mapping.access:
                    await self._bring_in_patiently(mapping, done)
                    self._record(mapping)
                else:
                    self.table.replace(mapping)
        finally:
            self._settled.set()
            self._settled = None
            # Not before: the reader asks whether this is settled only while it may block.
            self.may_block = perf_counter_ns() < self._patient_until

    async def _bring_in_patiently(self, mapping: Mapping, done: int) -> None:
        count = mapping.end - mapping.start
        source = None
        if not self._is_zero(mapping):
            assert mapping.frame is not None, "only NO_ACCESS has none"
            source = self._image.read_apart(mapping.frame.page, count)
            if source is None:
                raise _not_at_hand(done)
        address = None if source is None else source.address
        began = perf_counter_ns()
        try:
            await self._in_worker(partial(self._fill, mapping.start_uaddr_page, address, count, done), done)
        finally:
            took = perf_counter_ns() - began
            self._count(took)
            if took > SLOW_NS:
                self.be_patient(PATIENT_NS)

    async def _in_worker(self, fill: Callable[[], None], done: int = 0) -> None:
        try:
            with trio.CancelScope(shield=True):
                await self._uffd.in_worker(fill)
        except OSError as error:
            raise MemoryChanging(f"no thread for an ioctl: {error}", done=done) from error

    def _record(self, mapping: Mapping) -> None:
        count = mapping.end - mapping.start
        self.table.replace(mapping)
        if PREFETCHING.get():
            self.prefetched_pages += count
        else:
            self.demanded_pages += count
        if self._is_zero(mapping):
            self.zeroed_pages += count

    def _fill(self, page: int, source: int | None, count: int, done: int) -> None:
        """Bring in pages, from an address or zero, and wake who waits for them. One that is in already is
        left as it is, and so is one that is no memory of the VMM any more. No trio: it may run in a worker.

        Raises `HypervisorError`, `MemoryChanging`.
        """
        uffd, end, most, found = self._uffd, page + count, count, False
        at = page
        try:
            while at < end:
                part = min(most, end - at)
                if source is None:
                    brought = uffd.zero(at, part)
                else:
                    brought = uffd.copy(at, source + (at - page << PAGE_SHIFT), part)
                if brought > 0:
                    at += brought
                elif brought == -errno.EEXIST:
                    found = True
                    at += self._unit
                elif brought != -errno.ENOENT:
                    self.vmm_gone |= brought == -errno.ESRCH
                    raise _refused(-brought, at, done)
                elif part > self._unit:
                    most = part // self._unit // 2 * self._unit
                else:
                    at += self._unit
        finally:
            if found:
                uffd.wake(UaddrRange(start=page, end=end))

    def _count(self, took: int) -> None:
        self._map_calls += 1
        self._port_calls.map_gpa.record(took)

    @staticmethod
    def _is_zero(mapping: Mapping) -> bool:
        return mapping.frame is not None and mapping.frame.backing == ZERO_BACKING


def _sleeps() -> int:
    """How often this thread has slept (voluntary context switches)."""
    return resource.getrusage(resource.RUSAGE_THREAD).ru_nvcsw


def _refused(number: int, page: int, done: int) -> HypervisorError:
    if number == errno.EAGAIN:
        return MemoryChanging("the VMM is changing its memory", done=done)
    name = errno.errorcode.get(number, str(number))
    return HypervisorError(number, f"uaddr {page << PAGE_SHIFT:#x} cannot be brought in: {name}", done=done)


def _not_at_hand(done: int) -> MemoryChanging:
    return MemoryChanging("the page cache has lost what was read of the image", done=done)
