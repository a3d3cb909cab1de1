"""A guest whose memory comes from an image: its VMM, its state, and its figures.

Owns what is particular to such a partition: when its VMM begins and ends to be served, and what becomes of it
when the image or the daemon fails it. Must not know how the VMM was found, nor how a page is brought in.
"""

from __future__ import annotations

import signal
from collections.abc import Sequence
from enum import Enum
from time import perf_counter_ns
from typing import Final, NoReturn

import structlog
import trio

from intercept_protocol import events
from intercept_protocol.addresses import GfnRange
from intercept_protocol.messages import OnImageError, Restore, RestoreState, RestoreStatistics
from intercept_protocol.outcomes import Answer
from intercept_protocol.text import sentence
from interceptd.address_space.image import ImageAddressSpace
from interceptd.address_space.workers import Workers
from interceptd.connections.peer import Pidfd
from interceptd.hypervisor.userfaultfd import UserfaultfdHypervisor
from interceptd.log_pace import LogPace
from interceptd.memory.region import Region
from interceptd.partition.completion import Completion
from interceptd.partition.fault_reader import FaultReader
from interceptd.partition.handed_over import HandedOver, has_ended
from interceptd.telemetry.counters import RestoreCounts
from interceptd.telemetry.event_bus import PartitionPublisher
from interceptd.telemetry.histogram import LatencyHistogram

log = structlog.get_logger()

TRIM_SECONDS: Final = 5.0


class Ending(Enum):
    """What became of a restore."""

    ENDED = "ended"
    """The VMM has ended, or had all its pages when the daemon did."""
    KILLED = "killed"
    LEFT_FROZEN = "left_frozen"
    NOT_CLAIMED = "not_claimed"
    """No VMM has handed over in time."""
    DRAINED = "drained"
    """None had when the daemon ended."""


class RestoredGuest:
    """What is served to `vmm`; `options` are those of the request, `workers` all threads of it."""

    def __init__(
        self,
        options: Restore,
        vmm: HandedOver,
        regions: Sequence[Region],
        *,
        image_pages: int,
        workers: Sequence[Workers],
        memory: ImageAddressSpace,
        hypervisor: UserfaultfdHypervisor,
        reader: FaultReader,
        completion: Completion,
        event_bus: PartitionPublisher,
    ) -> None:
        self._options = options
        self._image_pages = image_pages
        self._workers = workers
        self._vmm = vmm
        self.regions = regions
        self._memory = memory
        self._hypervisor = hypervisor
        self.reader = reader
        self.completion = completion
        self._event_bus = event_bus
        self._handed_over_ns = perf_counter_ns()
        self._ended = False
        self._pages_at_end = 0
        self.error = ""
        """Why it has ended; empty if nothing is wrong."""
        self._image_error = ""
        self._warnings = LogPace()
        self._most_around = 0
        self.ending = Ending.ENDED
        """What became of it, once it has ended."""

    @property
    def state(self) -> RestoreState:
        if self._ended:
            return RestoreState.ENDED
        return RestoreState.COMPLETE if self.completion.reached else RestoreState.SERVING

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
        return self._memory.vmm_gone.is_set() or has_ended(self._vmm.pidfd)

    def image_failed(self, error: OSError) -> None:
        """The image could not be read. The guest waits, and the image is read again, or the VMM is killed;
        nothing else ever stands where its content belongs."""
        self._image_error = f"the image cannot be read: {sentence(error)}"
        if (not_warned := self._warnings.passed_over("image")) is not None:
            log.error("image_failed", error=sentence(error), not_warned=not_warned)
            self._event_bus.publish(events.ImageFailed(error=sentence(error)[: events.ERROR_LENGTH]))
        if self._options.on_image_error is OnImageError.KILL and not self.vmm_gone:
            self._abandon(self._image_error)

    def end(self) -> None:
        """Call it when the partition has ended. A VMM that lives on and lacks pages stays frozen, or is
        killed. Closes what the VMM handed over."""
        self._ended = True
        if not self.completion.reached and not self.vmm_gone:
            self._abandon(self.error or "the daemon ended before all pages were in")
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

    def counts(self) -> RestoreCounts:
        """None decreases, also when the guest ends."""
        reader, hypervisor = self.reader, self._hypervisor
        demand = self._demand_pages
        # A page may be in before its fault is counted: until then it looks like one around another.
        self._most_around = max(self._most_around, hypervisor.demanded_pages - demand)
        is_over = self.state in (RestoreState.COMPLETE, RestoreState.ENDED)
        return RestoreCounts(
            demand_pages=demand,
            around_pages=self._most_around,
            prefetched_pages=hypervisor.prefetched_pages,
            zero_pages=hypervisor.zeroed_pages,
            retries=reader.retries,
            image_errors=self._memory.failures,
            faults=reader.latency.all,
            first_fault=self._after(reader.first_fault_ns),
            quiet=self._after(reader.last_fault_ns if is_over else None),
        )

    def statistics(self) -> RestoreStatistics:
        reader, hypervisor, demand = self.reader, self._hypervisor, self._demand_pages
        return RestoreStatistics(
            state=self.state,
            image_pages=self._image_pages,
            pages_in=self._pages_at_end if self._ended else self._pages_in,
            demand_pages=demand,
            around_pages=hypervisor.demanded_pages - demand,
            prefetched_pages=hypervisor.prefetched_pages,
            zero_pages=hypervisor.zeroed_pages,
            removed_pages=self._memory.removed_pages,
            faults=reader.intercepts,
            retries=reader.retries,
            image_errors=self._memory.failures,
            age_ms=self._ms_since_hand_over(perf_counter_ns()),
            first_fault_ms=self._at(reader.first_fault_ns),
            quiet_ms=self._at(reader.last_fault_ns),
            pid=self._vmm.peer.pid,
            error=self.error or (self._image_error if self._waits_for_image else reader.held_up),
            latency=reader.latency.all.buckets,
            oldest_fault_ms=0 if self._ended else reader.oldest_fault_ms,
        )

    @property
    def _demand_pages(self) -> int:
        return min(self.reader.answers[Answer.MAPPED] * self._vmm.unit, self._hypervisor.demanded_pages)

    @property
    def _waits_for_image(self) -> bool:
        return self._memory.is_failing and self.reader.state == "waiting"

    @property
    def _pages_in(self) -> int:
        return self._hypervisor.counters().mapped_gfns

    def _at(self, ns: int | None) -> int | None:
        return None if ns is None else self._ms_since_hand_over(ns)

    def _ms_since_hand_over(self, ns: int) -> int:
        """Until a time of the performance counter."""
        return self._since_hand_over(ns) // 1_000_000

    def _after(self, ns: int | None) -> LatencyHistogram:
        """The time until then, alone in a histogram."""
        histogram = LatencyHistogram()
        if ns is not None:
            histogram.record(self._since_hand_over(ns))
        return histogram

    def _since_hand_over(self, ns: int) -> int:
        return max(ns - self._handed_over_ns, 0)

    def _abandon(self, why: str) -> None:
        self.ending, self.error = abandon(self._vmm.pidfd, self._options.on_image_error, why, self._event_bus)


def abandon(vmm: Pidfd, policy: OnImageError, why: str, event_bus: PartitionPublisher) -> tuple[Ending, str]:
    """Nobody can serve a VMM any more that lacks pages: kill it or leave it frozen, as was asked for. Returns
    which of them was done, and why."""
    if policy is OnImageError.KILL:
        try:
            signal.pidfd_send_signal(vmm.fileno(), signal.SIGKILL)
        except OSError as error:
            why = f"cannot be killed ({sentence(error)}): {why}"
        else:
            log.error("guest_killed", error=why)
            event_bus.publish(events.GuestKilled(error=why[: events.ERROR_LENGTH]))
            return Ending.KILLED, f"killed: {why}"
    log.critical("guest_left_frozen", error=why)
    event_bus.publish(events.GuestLeftFrozen(error=why[: events.ERROR_LENGTH]))
    return Ending.LEFT_FROZEN, why
