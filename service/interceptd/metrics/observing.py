"""A snapshot of the daemon's figures, for a scrape.

Owns the choice of figures, and yields between partitions so that no VP waits long. Must not know how the
figures are named or shown.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

import trio

from intercept_protocol.messages import MemoryWatch, RestoreState
from interceptd.address_space.process import ProcessAddressSpace
from interceptd.metrics.loop_lag import LoopLag
from interceptd.partition.partition import Partition
from interceptd.partition.registry import PartitionRegistry
from interceptd.partition.restored_guest import Ending
from interceptd.scheduling.step_monitor import StepMonitor
from interceptd.sessions.dispatcher import Dispatcher
from interceptd.systemd.notify import ServiceManager
from interceptd.telemetry.counters import Totals
from interceptd.telemetry.histogram import LatencyHistogram


@dataclass(slots=True)
class Gauges:
    """Current figures, summed over all partitions."""

    vps: int = 0
    notifiers: int = 0
    hypervisors: int = 0
    regions: int = 0
    vmas: int = 0
    open_invalidations: int = 0
    mapped_gfns: int = 0
    no_access_gfns: int = 0
    slat_extents: int = 0
    busy_workers: int = 0
    oldest_fault_ms: int = 0
    """Of a restored guest, the longest that one waits."""
    watches: Counter[MemoryWatch] = field(default_factory=Counter)
    """Partitions, by how their memory is watched."""

    def add(self, partition: Partition) -> None:
        slat = partition.hypervisor.counters()
        self.vps += len(partition.vps)
        self.notifiers += partition.notifiers
        self.hypervisors += partition.link is not None and partition.link.connected
        self.regions += partition.regions.region_count
        self.vmas += partition.address_space.vma_count
        self.open_invalidations += partition.notifier.open_invalidations
        self.mapped_gfns += slat.mapped_gfns
        self.no_access_gfns += slat.no_access_gfns
        self.slat_extents += slat.slat_extents
        self.watches[partition.memory.watch] += 1
        if partition.restored is not None:
            self.oldest_fault_ms = max(self.oldest_fault_ms, partition.restored.reader.oldest_fault_ms)
        if isinstance(partition.memory, ProcessAddressSpace):
            self.busy_workers += partition.memory.busy_workers


@dataclass(frozen=True, slots=True)
class Observation:
    """Plain figures. Durations are in seconds, and in nanoseconds where the name says so."""

    memory_budget: int
    memory_estimated: int
    """Bytes."""
    partitions: int
    partitions_created: int
    partitions_lost: int
    recoveries: Mapping[str, int]
    """Of a predecessor's partitions, by result."""
    restores: Mapping[RestoreState, int]
    """That go on now."""
    restore_endings: Mapping[Ending, int]
    totals: Totals
    gauges: Gauges
    connections: Mapping[str, int]
    """By role; `none` stands for connections without a hello."""
    refusals: Mapping[str, int]
    refused_requests: Mapping[tuple[str, str], int]
    """By method and error."""
    draining: bool
    tasks: int
    lag: LatencyHistogram
    longest_lag_ns: int
    long_steps: Mapping[str, int]
    """Beyond the limit, by the name of the task's function."""
    watchdog_period: float
    """0 without a watchdog."""
    watchdog_notifications: int
    requests: Mapping[str, int] = field(default_factory=dict)
    """To the metrics listener itself, by result."""


@dataclass(frozen=True, slots=True)
class Observer:
    """Reads the figures from the parts of a daemon."""

    partitions: PartitionRegistry
    dispatcher: Dispatcher
    manager: ServiceManager
    monitor: StepMonitor
    lag: LoopLag
    requests: Mapping[str, int]

    async def observe(self) -> Observation:
        """Counters never decrease from one observation to the next. Yields after each partition."""
        totals, gauges = Totals(), Gauges()
        for part in self.partitions.parts():
            totals.add(part)
            await trio.lowlevel.checkpoint()
        for partition in self.partitions:
            gauges.add(partition)
            await trio.lowlevel.checkpoint()
        dispatcher = self.dispatcher
        memory = dispatcher.admission.tenants.memory
        return Observation(
            memory_budget=memory.limit,
            memory_estimated=memory.estimated,
            partitions=len(self.partitions),
            partitions_created=self.partitions.created,
            partitions_lost=self.partitions.lost,
            recoveries={
                "recovered": self.partitions.recovered,
                "not_recovered": self.partitions.not_recovered,
            },
            restores=dispatcher.restores.states(),
            restore_endings=dispatcher.restores.endings,
            totals=totals,
            gauges=gauges,
            connections={
                "none": dispatcher.admission.without_hello,
                "vmm": dispatcher.vmms,
                "vp": gauges.vps,
                "notifier": gauges.notifiers,
                "hypervisor": gauges.hypervisors,
                "operator": dispatcher.operators,
            },
            refusals=dispatcher.admission.refusals,
            refused_requests=dict(dispatcher.admission.tenants.refused.counts),
            draining=self.partitions.closed,
            tasks=trio.lowlevel.current_statistics().tasks_living,
            lag=self.lag.histogram,
            longest_lag_ns=self.lag.longest_ns,
            long_steps=dict(self.monitor.long_steps),
            watchdog_period=self.manager.watchdog or 0.0,
            watchdog_notifications=self.manager.watchdog_notifications,
            requests=self.requests,
        )
