"""A guest whose memory comes from an image: its VMM, its state, and its figures.

Owns what is particular to such a partition: when its VMM begins and ends to be served, and what becomes of it
when the image or the daemon fails it. Must not know how the VMM was found, nor how a page is brought in.
"""

from __future__ import annotations

import select
import signal
import socket
from collections.abc import Sequence
from time import perf_counter_ns
from typing import Final, NoReturn

import structlog
import trio

from intercept_protocol.addresses import PAGE_SHIFT, PAGE_SIZE, GfnRange, UaddrRange
from intercept_protocol.events import ERROR_LENGTH, ImageFailed
from intercept_protocol.handoff import HandoffRegion
from intercept_protocol.messages import OnImageError, RegionKind, Restore, RestoreState, RestoreStatistics
from intercept_protocol.outcomes import Access, Answer
from intercept_protocol.text import sentence
from interceptd.address_space.image import ImageAddressSpace, ImagePart
from interceptd.address_space.workers import Workers
from interceptd.connections.closer import Closer
from interceptd.connections.peer import Peer, Pidfd
from interceptd.hypervisor.userfaultfd import UserfaultfdHypervisor
from interceptd.log_pace import LogPace
from interceptd.memory.region import KindOrigin, Region
from interceptd.partition.fault_reader import FaultReader
from interceptd.telemetry.event_bus import PartitionPublisher

log = structlog.get_logger()

TRIM_SECONDS: Final = 5.0
_ALL_RIGHTS = Access.READ | Access.WRITE | Access.EXECUTE


class HandedOver:
    """What a VMM handed over. Owns the connection, the pidfd and the userfaultfd, which `closer` closes."""

    def __init__(
        self,
        connection: socket.socket,
        pidfd: Pidfd,
        userfaultfd: int,
        regions: Sequence[HandoffRegion],
        closer: Closer,
    ) -> None:
        self.connection = connection
        """Nothing comes over it any more, and its end means nothing (Firecracker up to 1.11 closes it)."""
        self.peer = Peer.of(connection)
        self.pidfd = pidfd
        self.userfaultfd = userfaultfd
        self.regions = regions
        self.unit = regions[0].page_size // PAGE_SIZE
        """Of 4 KiB: the pages of all regions have one size."""
        self._closer = closer

    def close(self) -> None:
        """Does not block, though to close a userfaultfd waits for the mmap lock of its process."""
        self._closer.close([self.userfaultfd])
        self._closer.close_connection(self.connection.detach())
        self.pidfd.close()


class RestoredGuest:
    """What is served to `vmm`; `options` are those of the request, `workers` all threads of it."""

    def __init__(
        self,
        options: Restore,
        vmm: HandedOver,
        regions: Sequence[Region],
        *,
        event_bus: PartitionPublisher,
        image_pages: int,
        workers: Sequence[Workers],
        memory: ImageAddressSpace,
        hypervisor: UserfaultfdHypervisor,
        reader: FaultReader,
    ) -> None:
        self._options = options
        self._event_bus = event_bus
        self._image_pages = image_pages
        self._workers = workers
        self._vmm = vmm
        self.regions = regions
        self._memory = memory
        self._hypervisor = hypervisor
        self.reader = reader
        self._handed_over_ns = perf_counter_ns()
        self._ended = False
        self._pages_at_end = 0
        self.error = ""
        """Why it has ended; empty if nothing is wrong."""
        self._image_error = ""
        self._warnings = LogPace()

    @property
    def state(self) -> RestoreState:
        return RestoreState.ENDED if self._ended else self.reader.restore_state

    async def wait_vmm_ended(self) -> None:
        """Block until the process that handed its memory over has ended."""
        await trio.lowlevel.wait_readable(self._vmm.pidfd)

    async def trim_workers(self) -> NoReturn:
        """End the threads that have nothing to do for a while."""
        while True:
            await trio.sleep(TRIM_SECONDS)
            for workers in self._workers:
                workers.trim()

    def note_pages(self) -> None:
        """Call it before the partition's end, which empties the table: so many pages are in."""
        self._pages_at_end = self._pages_in

    @property
    def vmm_gone(self) -> bool:
        """Whether the process, or the memory that it handed over, is no more."""
        return self._memory.vmm_gone.is_set() or _has_ended(self._vmm.pidfd)

    def image_failed(self, error: OSError) -> None:
        """The image could not be read. The guest waits, and the image is read again, or the VMM is killed;
        nothing else ever stands where its content belongs."""
        self._image_error = f"the image cannot be read: {sentence(error)}"
        if (not_warned := self._warnings.passed_over("image")) is not None:
            why = sentence(error)
            log.error("image_failed", error=why, not_warned=not_warned)
            self._event_bus.publish(ImageFailed(error=why[:ERROR_LENGTH]))
        if self._options.on_image_error is OnImageError.KILL:
            self._kill(self._image_error)

    def end(self) -> None:
        """Call it when the partition has ended. A VMM that lives on and lacks pages stays frozen, or is
        killed. Closes what the VMM handed over."""
        complete = self.state is RestoreState.COMPLETE
        self._ended = True
        if not complete and not self.vmm_gone:
            why = self.error or "the daemon ended before all pages were in"
            if self._options.on_image_error is OnImageError.KILL:
                self._kill(why)
            else:
                self.error = why
                log.critical("guest_left_frozen", error=why)
        for workers in self._workers:
            workers.close()
        self._vmm.close()

    def image_gfns(self, gfns: GfnRange) -> list[GfnRange]:
        """The parts of `gfns` that come from the image: what the VMM gave back does not any more."""
        parts = []
        for region in self.regions:
            start, end = max(gfns.start, region.gfns.start), min(gfns.end, region.gfns.end)
            if start < end:
                uaddrs = region.uaddrs_of(GfnRange(start=start, end=end))
                parts += [region.gfns_of(run) for run in self._memory.image_runs(uaddrs)]
        return parts

    def statistics(self) -> RestoreStatistics:
        reader, hypervisor = self.reader, self._hypervisor
        demanded = min(reader.answers[Answer.MAPPED] * self._vmm.unit, hypervisor.demanded_pages)
        return RestoreStatistics(
            state=self.state,
            image_pages=self._image_pages,
            pages_in=self._pages_at_end if self._ended else self._pages_in,
            demand_pages=demanded,
            around_pages=hypervisor.demanded_pages - demanded,
            prefetched_pages=hypervisor.prefetched_pages,
            zero_pages=hypervisor.zeroed_pages,
            removed_pages=self._memory.removed_pages,
            faults=reader.intercepts,
            retries=reader.retries,
            image_errors=self._memory.failures,
            age_ms=self._since_hand_over(perf_counter_ns()),
            first_fault_ms=self._at(reader.first_fault_ns),
            quiet_ms=self._at(reader.last_fault_ns),
            pid=self._vmm.peer.pid,
            error=self.error or (self._image_error if self._waits_for_image else ""),
            latency=reader.latency.all.buckets,
        )

    @property
    def _waits_for_image(self) -> bool:
        return self._memory.is_failing and self.reader.state == "waiting"

    @property
    def _pages_in(self) -> int:
        return self._hypervisor.counters().mapped_gfns

    def _at(self, ns: int | None) -> int | None:
        return None if ns is None else self._since_hand_over(ns)

    def _since_hand_over(self, ns: int) -> int:
        """Milliseconds until a time of the performance counter."""
        return max(ns - self._handed_over_ns, 0) // 1_000_000

    def _kill(self, why: str) -> None:
        if self.vmm_gone:
            return
        self.error = f"killed: {why}"
        try:
            signal.pidfd_send_signal(self._vmm.pidfd.fileno(), signal.SIGKILL)
        except OSError as error:
            self.error = f"cannot be killed ({sentence(error)}): {why}"
            log.critical("guest_left_frozen", error=self.error)
        else:
            log.error("guest_killed", error=why)


def _has_ended(process: Pidfd) -> bool:
    poll = select.poll()
    poll.register(process, select.POLLIN)
    return bool(poll.poll(0))


def parts_of(vmm: HandedOver) -> list[ImagePart]:
    """Where in the VMM which part of the image belongs."""
    return [
        ImagePart(
            region.base_host_virt_addr >> PAGE_SHIFT,
            (region.base_host_virt_addr + region.size) >> PAGE_SHIFT,
            region.offset >> PAGE_SHIFT,
        )
        for region in vmm.regions
    ]


def regions_of(vmm: HandedOver, around_pages: int) -> list[Region]:
    """The same as regions: a gfn is a page number of the image."""
    return [
        Region(
            gfns=GfnRange.of(region.offset >> PAGE_SHIFT, region.size >> PAGE_SHIFT),
            uaddrs=UaddrRange.of_pages(region.base_host_virt_addr, region.size >> PAGE_SHIFT),
            kind=RegionKind.MOVABLE,
            kind_origin=KindOrigin.STATED,
            access=_ALL_RIGHTS,
            block=max(around_pages, vmm.unit),
        )
        for region in vmm.regions
    ]
