"""An operator's everyday requests.

Owns building each request and taking the result out of its reply, once for both shells: `_blocking_clients`
and `_trio_clients` make methods of these functions, so their names, parameters and docstrings agree. Must not
do I/O.
"""

from __future__ import annotations

from collections.abc import Iterable

from intercept_protocol import messages
from intercept_protocol.events import EventName, Reason
from intercept_protocol.messages import (
    DaemonStatistics,
    MappingView,
    MmioGranularity,
    PartitionInspection,
    PartitionSummary,
    RegionView,
    TraceBegun,
    VmaView,
)

from ._exchange import Exchange, call_exchange
from ._series import Series, pages
from ._trace_ring import TraceRing


def inspect_partition(partition_id: int) -> Exchange[PartitionInspection]:
    """One partition in full: its settings, counters, regions and VPs."""
    return call_exchange(messages.InspectPartition(partition_id=partition_id))


def statistics() -> Exchange[DaemonStatistics]:
    """The daemon's counters, over all partitions."""
    return call_exchange(messages.OperatorStatistics())


def set_policy(partition_id: int, *, mmio_granularity: MmioGranularity | None = None) -> Exchange[None]:
    """Change how a partition maps from now on; what is mapped stays, and so does what is None."""
    return call_exchange(
        messages.OperatorSetPolicy(partition_id=partition_id, mmio_granularity=mmio_granularity)
    )


def drain(timeout_ms: int) -> Exchange[None]:
    """Have the daemon answer what is under way, for at most that long, and end.

    Returns at once; the daemon closes the connection when it ends.
    """
    return call_exchange(messages.Drain(timeout_ms=timeout_ms))


def restart() -> Exchange[None]:
    """Exchange the daemon for one that is started anew, and goes on with all partitions.

    Returns once that one is known to be able to; the daemon then closes the connection. Trying takes up to
    half a minute. Refused where a restart is not survived: see `features["kept"]` in `hello`.
    """
    return call_exchange(messages.Restart())


def subscribe(
    events: Iterable[EventName],
    *,
    partition_id: int | None = None,
    vp_index: int | None = None,
    reasons: Iterable[Reason] | None = None,
) -> Exchange[None]:
    """Ask for events, which `next_events` then waits for; replaces this connection's earlier subscription.

    None asks for those of every partition, VP and reason. Subscribing to no events ends the subscription.
    """
    return call_exchange(
        messages.Subscribe(
            events=list(events),
            partition_id=partition_id,
            vp_index=vp_index,
            reasons=None if reasons is None else list(reasons),
        )
    )


def trace(partition_id: int, ring: TraceRing) -> Exchange[TraceBegun]:
    """Have the daemon write what happens in a partition into `ring`, until this connection ends.

    One connection traces one partition, and a partition is traced once: EBUSY for another.
    """
    return call_exchange(messages.Trace(partition_id=partition_id), [ring.descriptor])


def list_partitions() -> Series[list[PartitionSummary]]:
    """Every partition, by ascending id, in as many requests as it takes."""
    return pages(
        lambda after: messages.ListPartitions(after=after or 0),
        lambda page: page.partitions,
        lambda partition: partition.partition_id,
    )


def list_regions(partition_id: int) -> Series[list[RegionView]]:
    """Every region of a partition, by ascending gfn, in as many requests as it takes."""
    return pages(
        lambda after: messages.OperatorListRegions(partition_id=partition_id, after=after),
        lambda page: page.regions,
        lambda region: region.start_gfn,
    )


def list_vmas(partition_id: int) -> Series[list[VmaView]]:
    """Every VMA that a VMM declared, by ascending uaddr, in as many requests as it takes.

    Only of a partition whose address space is declared.
    """
    return pages(
        lambda after: messages.OperatorListVmas(partition_id=partition_id, after=after),
        lambda page: page.vmas,
        lambda vma: vma.start_uaddr,
    )


def list_mappings(partition_id: int) -> Series[list[MappingView]]:
    """What a guest reaches, by ascending gfn, in as many requests as it takes."""
    return pages(
        lambda after: messages.OperatorListMappings(partition_id=partition_id, after=after),
        lambda page: page.mappings,
        lambda mapping: mapping.start_gfn,
    )
