"""What partitions count, added up: counters outlive the partitions that they were counted in.

Owns which counters there are and how they are added. Pure; must not know partitions or who reads the sums.
"""

from __future__ import annotations

from collections import Counter
from enum import Enum

import msgspec

from intercept_protocol.outcomes import Answer
from interceptd.telemetry.histogram import InterceptLatency, LatencyHistogram


class Source(Enum):
    """Who said that memory is going."""

    NOTIFIER = "notifier"
    """A notifier connection: `invalidate_begin` or `invalidate`."""
    UNMAP_VMA = "unmap_vma"
    PROTECT_VMA = "protect_vma"
    USERFAULTFD = "userfaultfd"
    COMPARISON = "comparison"
    """Nobody: the guest's mappings were compared with the process's."""


class Stages(msgspec.Struct, frozen=True):
    """How long the parts took of those intercepts that more than a look was needed for.

    The others are two thirds of a C echo's time: to take the clock between their parts would be felt.
    """

    decode: LatencyHistogram = msgspec.field(default_factory=LatencyHistogram)
    """From the message to the end of the first look, which did not decide it."""
    wait: LatencyHistogram = msgspec.field(default_factory=LatencyHistogram)
    """For an invalidation to end, or another's map or unmap of the page."""
    resolve: LatencyHistogram = msgspec.field(default_factory=LatencyHistogram)
    """What stands behind the page, the address space was asked."""
    map: LatencyHistogram = msgspec.field(default_factory=LatencyHistogram)
    """The commit: the region lock, and the hypervisor's maps under it."""

    def add(self, other: Stages) -> None:
        for stage, own in msgspec.structs.asdict(self).items():
            own.add(getattr(other, stage))


class PortCalls(msgspec.Struct, frozen=True):
    """How long the hypervisor took to map and to unmap, whoever had asked for it."""

    map_gpa: LatencyHistogram = msgspec.field(default_factory=LatencyHistogram)
    unmap_gpa: LatencyHistogram = msgspec.field(default_factory=LatencyHistogram)

    def add(self, other: PortCalls) -> None:
        self.map_gpa.add(other.map_gpa)
        self.unmap_gpa.add(other.unmap_gpa)


class Totals(msgspec.Struct):
    """Counters of one partition, or of many."""

    answers: Counter[Answer] = msgspec.field(default_factory=Counter)
    intercepts: InterceptLatency = msgspec.field(default_factory=InterceptLatency)
    stages: Stages = msgspec.field(default_factory=Stages)
    port_calls: PortCalls = msgspec.field(default_factory=PortCalls)
    invalidations: Counter[Source] = msgspec.field(default_factory=Counter)
    passes: LatencyHistogram = msgspec.field(default_factory=LatencyHistogram)
    """Of the region manager: from the oldest invalidation that it served to the acknowledgement of all."""
    stale_attempts: int = 0
    map_calls: int = 0
    unmap_calls: int = 0
    deposits: int = 0

    def add(self, other: Totals) -> None:
        """Count all that `other` counted."""
        self.answers.update(other.answers)
        self.intercepts.add(other.intercepts)
        self.stages.add(other.stages)
        self.port_calls.add(other.port_calls)
        self.invalidations.update(other.invalidations)
        self.passes.add(other.passes)
        self.stale_attempts += other.stale_attempts
        self.map_calls += other.map_calls
        self.unmap_calls += other.unmap_calls
        self.deposits += other.deposits
