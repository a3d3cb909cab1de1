"""What an operator may ask: to read every partition and control a few things.

Owns the `operator` methods. It sees the daemon through `Overview` and its event bus.
"""

from __future__ import annotations

import errno
import time
from collections.abc import Coroutine, Iterator
from heapq import merge
from itertools import islice
from operator import attrgetter
from typing import Protocol

from intercept_protocol import messages
from intercept_protocol.errors import WireError
from intercept_protocol.messages import OperatorCall
from intercept_protocol.trace import ANSWERS, RECORD_SIZE, REGION_KINDS, SOURCES
from interceptd.connections.received_fds import ReceivedFds
from interceptd.connections.request_loop import Reply
from interceptd.partition.partition import Partition
from interceptd.partition.registry import PartitionRegistry
from interceptd.scheduling.time_share import give_way
from interceptd.sessions import views
from interceptd.sessions.vmm import set_policy
from interceptd.telemetry.event_bus import EventBus, EventFilter, Subscription
from interceptd.telemetry.histogram import BOUNDARIES_NS
from interceptd.telemetry.trace import Trace, TraceRing


class Overview(Protocol):
    """What an operator sees of the daemon."""

    @property
    def partitions(self) -> PartitionRegistry: ...

    def waiting_restores(self) -> Iterator[messages.PartitionSummary]:
        """Partitions to be, which wait for their VMM, by ascending id."""
        ...

    async def daemon_statistics(self) -> messages.DaemonStatistics: ...

    def drain(self, timeout: float) -> None:
        """Begin the daemon's end; it is over after at most `timeout` seconds."""

    async def restart(self) -> None:
        """Check that a successor could go on. Raises `WireError` if it could not, or if nothing would start
        it.

        Takes up to 30 s.
        """

    def rest(self) -> None:
        """Exit, and leave all partitions to the successor. Does not return."""


class OperatorSession:
    """One operator's; `subscription` is what is sent to it."""

    def __init__(
        self, overview: Overview, event_bus: EventBus, subscription: Subscription, descriptors: ReceivedFds
    ) -> None:
        self._overview = overview
        self._descriptors = descriptors
        self._traced: Partition | None = None
        self._event_bus = event_bus
        self._subscription = subscription
        self._restarting = False

    def answered(self) -> None:
        """Call it once an answer was sent. If that was to `restart`, the process exits."""
        if self._restarting:
            self._overview.rest()

    def close(self) -> None:
        """The operator has left."""
        self._event_bus.unsubscribe(self._subscription)
        if self._traced is not None and (trace := self._traced.trace) is not None:
            self._traced.trace_into(None)
            trace.close()

    def answer(self, call: OperatorCall) -> Reply | Coroutine[object, object, Reply]:
        match call:
            case messages.ListPartitions():
                return self._list(call.after)
            case messages.InspectPartition():
                return _inspect(self._find(call.partition_id))
            case messages.OperatorStatistics():
                return self._overview.daemon_statistics()
            case messages.Histograms():
                return _histograms(self._find(call.partition_id), call.after)
            case messages.OperatorSetPolicy():
                set_policy(self._find(call.partition_id), call)
            case messages.Drain():
                self._overview.drain(call.timeout_ms / 1000)
            case messages.Restart():
                return self._restart()
            case messages.OperatorListRegions():
                return views.region_page(self._find(call.partition_id), call.after)
            case messages.OperatorListVmas():
                return views.vma_page(self._find(call.partition_id), call.after)
            case messages.OperatorListMappings():
                return views.mapping_page(self._find(call.partition_id), call.after)
            case messages.Subscribe():
                self._event_bus.subscribe(self._subscription, _filter(call))
            case messages.Trace():
                return self._trace(self._find(call.partition_id))
        return None

    def _trace(self, partition: Partition) -> messages.TraceBegun:
        descriptors = self._descriptors.lent()
        if self._traced is not None:
            raise WireError(errno.EBUSY, "trace: this connection traces a partition already")
        if partition.trace is not None:
            raise WireError(errno.EBUSY, f"trace: partition {partition.partition_id} is traced already")
        if len(descriptors) != 1:
            raise WireError(errno.EINVAL, f"trace: takes one descriptor, not {len(descriptors)}")
        ring = TraceRing(descriptors[0])
        partition.trace_into(Trace(ring))
        self._traced = partition
        return messages.TraceBegun(
            records=ring.records,
            record_size=RECORD_SIZE,
            answers=ANSWERS,
            sources=SOURCES,
            region_kinds=REGION_KINDS,
        )

    async def _restart(self) -> None:
        await self._overview.restart()
        self._restarting = True

    async def _list(self, after: int) -> messages.PartitionList:
        everything: Iterator[Partition | messages.PartitionSummary] = merge(
            self._overview.partitions, self._overview.waiting_restores(), key=attrgetter("partition_id")
        )
        following = (each for each in everything if each.partition_id > after)
        page = list(islice(following, messages.PartitionList.PAGE + 1))
        summaries = []
        for each in page[: messages.PartitionList.PAGE]:
            summaries.append(_summary(each) if isinstance(each, Partition) else each)
            await give_way()
        return messages.PartitionList(partitions=summaries, more=len(page) > len(summaries))

    def _find(self, partition_id: int) -> Partition:
        partition = self._overview.partitions.find(partition_id)
        if partition is None:
            raise WireError(errno.ENOENT, f"no partition {partition_id}", partition_id=partition_id)
        return partition


def _filter(call: messages.Subscribe) -> EventFilter:
    return EventFilter(
        events=frozenset(call.events),
        partition_id=call.partition_id,
        vp_index=call.vp_index,
        reasons=frozenset(call.reasons or ()),
    )


def _summary(partition: Partition) -> messages.PartitionSummary:
    latency = partition.latency()
    return messages.PartitionSummary(
        partition_id=partition.partition_id,
        name=partition.name,
        uid=partition.owner.uid,
        pid=partition.owner.pid,
        address_space=partition.request.address_space,
        hypervisor=partition.request.hypervisor,
        vps=len(partition.vps),
        regions=partition.regions.region_count,
        mapped_gfns=partition.hypervisor.counters().mapped_gfns,
        intercepts=partition.answers.total(),
        invalidations=partition.notifier.invalidations,
        age_ms=int((time.monotonic() - partition.created_at) * 1000),
        latency=latency.all.buckets,
        latency_waited=latency.waited.buckets,
        watch=partition.memory.watch,
        open_invalidations=partition.notifier.open_invalidations,
        oldest_invalidation_ms=partition.notifier.oldest_open_ms,
        waiting_vps=sum(vp.state == "waiting" for vp in partition.vps.values()),
        memory_bytes=partition.memory_bytes(),
        restore="" if partition.restored is None else partition.restored.state,
    )


def _histograms(partition: Partition, after: int | None) -> messages.HistogramPage:
    first = 0 if after is None else after + 1
    following = sorted(index for index in partition.vps if index >= first)
    page = [partition.vps[index] for index in following[: messages.HistogramPage.PAGE]]
    return messages.HistogramPage(
        boundaries_ns=BOUNDARIES_NS,
        virtual_processors=[
            messages.VpHistogram(
                vp_index=vp.index,
                intercepts=vp.intercepts,
                total_ns=whole.total_ns,
                buckets=whole.buckets,
                waited_ns=vp.latency.waited.total_ns,
                waited_buckets=vp.latency.waited.buckets,
            )
            for vp, whole in ((vp, vp.latency.all) for vp in page)
        ],
        more=len(following) > len(page),
    )


def _inspect(partition: Partition) -> messages.PartitionInspection:
    regions = partition.regions.first_regions(messages.PartitionInspection.REGION_VIEWS)
    return messages.PartitionInspection(
        summary=_summary(partition),
        architecture=partition.request.architecture,
        mmio_granularity=partition.regions.mmio_granularity,
        statistics=partition.statistics(),
        regions=[views.region_view(region) for region in regions],
        virtual_processors=[
            messages.VpView(vp_index=vp.index, state=vp.state, intercepts=vp.intercepts)
            for vp in partition.vps.values()
        ],
        notifiers=partition.notifiers,
        hypervisor_connected=None if partition.link is None else partition.link.connected,
        userfaultfd_errno=partition.memory.userfaultfd_errno,
    )
