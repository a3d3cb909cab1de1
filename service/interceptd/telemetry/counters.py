"""The counters of partitions, and their sums, which outlive the partitions.

Owns the set of counters and their addition. Pure; must not know partitions, nor who reads the sums.
"""

from __future__ import annotations

from collections import Counter
from enum import Enum

import msgspec

from intercept_protocol.outcomes import Answer
from interceptd.telemetry.histogram import InterceptLatency, LatencyHistogram


class Source(Enum):
    """Who announced an invalidation."""

    NOTIFIER = "notifier"
    """A notifier connection: `invalidate_begin` or `invalidate`."""
    UNMAP_VMA = "unmap_vma"
    PROTECT_VMA = "protect_vma"
    USERFAULTFD = "userfaultfd"
    COMPARISON = "comparison"
    """It was not announced: the guest's mappings were compared with the process's VMAs."""


class Stages(msgspec.Struct, frozen=True):
    """Durations of the stages of those intercepts, and of prefaulted pages, that the first look-up did not
    decide.

    The others are too short for clock reads between their stages (`make bench`).
    """

    decode: LatencyHistogram = msgspec.field(default_factory=LatencyHistogram)
    """From the message to the end of the first look-up, which did not decide it."""
    wait: LatencyHistogram = msgspec.field(default_factory=LatencyHistogram)
    """For an invalidation to end, or for another task to map or unmap the page."""
    resolve: LatencyHistogram = msgspec.field(default_factory=LatencyHistogram)
    """Asking the address space for the frame behind the page."""
    map: LatencyHistogram = msgspec.field(default_factory=LatencyHistogram)
    """The commit: waiting for the region lock, and the hypervisor's maps under it."""

    def add(self, other: Stages) -> None:
        for stage, own in msgspec.structs.asdict(self).items():
            own.add(getattr(other, stage))


class PortCalls(msgspec.Struct, frozen=True):
    """Durations of all calls of the hypervisor port."""

    map_gpa: LatencyHistogram = msgspec.field(default_factory=LatencyHistogram)
    unmap_gpa: LatencyHistogram = msgspec.field(default_factory=LatencyHistogram)

    def add(self, other: PortCalls) -> None:
        self.map_gpa.add(other.map_gpa)
        self.unmap_gpa.add(other.unmap_gpa)


class RestoreCounts(msgspec.Struct):
    """Of one restored guest, or their sums over many; in pages of 4 KiB."""

    demand_pages: int = 0
    around_pages: int = 0
    prefetched_pages: int = 0
    zero_pages: int = 0
    """Of those three."""
    retries: int = 0
    """Times that the kernel refused because the VMM's memory was changing."""
    image_errors: int = 0
    faults: LatencyHistogram = msgspec.field(default_factory=LatencyHistogram)
    """From the read of a fault to its page."""
    first_fault: LatencyHistogram = msgspec.field(default_factory=LatencyHistogram)
    """Of each guest: from the hand-over to its first fault."""
    quiet: LatencyHistogram = msgspec.field(default_factory=LatencyHistogram)
    """Of each guest that will have no more of them: to its last fault."""

    def add(self, other: RestoreCounts) -> None:
        self.demand_pages += other.demand_pages
        self.around_pages += other.around_pages
        self.prefetched_pages += other.prefetched_pages
        self.zero_pages += other.zero_pages
        self.retries += other.retries
        self.image_errors += other.image_errors
        self.faults.add(other.faults)
        self.first_fault.add(other.first_fault)
        self.quiet.add(other.quiet)


class Totals(msgspec.Struct):
    """Counters of one partition, or their sums over many."""

    answers: Counter[Answer] = msgspec.field(default_factory=Counter)
    intercepts: InterceptLatency = msgspec.field(default_factory=InterceptLatency)
    stages: Stages = msgspec.field(default_factory=Stages)
    port_calls: PortCalls = msgspec.field(default_factory=PortCalls)
    invalidations: Counter[Source] = msgspec.field(default_factory=Counter)
    passes: LatencyHistogram = msgspec.field(default_factory=LatencyHistogram)
    """Of the region manager: from the oldest invalidation of a pass to the acknowledgement of all of them."""
    stale_attempts: int = 0
    split_large_pages: int = 0
    map_calls: int = 0
    unmap_calls: int = 0
    deposits: int = 0
    restore: RestoreCounts = msgspec.field(default_factory=RestoreCounts)

    def add(self, other: Totals) -> None:
        """Add the counters of `other`."""
        self.answers.update(other.answers)
        self.intercepts.add(other.intercepts)
        self.stages.add(other.stages)
        self.port_calls.add(other.port_calls)
        self.invalidations.update(other.invalidations)
        self.passes.add(other.passes)
        self.stale_attempts += other.stale_attempts
        self.split_large_pages += other.split_large_pages
        self.map_calls += other.map_calls
        self.unmap_calls += other.unmap_calls
        self.deposits += other.deposits
        self.restore.add(other.restore)
