"""An operator's everyday requests.

Owns building each request and taking the result out of its reply, once for both shells: `_blocking_clients`
and `_trio_clients` make methods of these functions, so their names, parameters and docstrings agree. Must not
do I/O.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable
from typing import Final

from intercept_protocol import messages
from intercept_protocol.errors import ProtocolViolation
from intercept_protocol.events import EventName, Reason
from intercept_protocol.messages import (
    DaemonStatistics,
    MmioGranularity,
    PartitionInspection,
    PartitionList,
    PartitionSummary,
)

from ._exchange import Exchange, call_exchange


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


class PartitionPages:
    """Asking for every partition, page after page: run `next_page` until it is None."""

    def __init__(self) -> None:
        self.partitions: Final[list[PartitionSummary]] = []
        self._after: int | None = 0

    def next_page(self) -> Exchange[PartitionList] | None:
        """The next request; None when `partitions` is complete."""
        return None if self._after is None else call_exchange(messages.ListPartitions(after=self._after))

    def take(self, page: PartitionList) -> None:
        """Take in the reply. Raises `ProtocolViolation` for one that would be asked for forever."""
        self.partitions.extend(page.partitions)
        if not page.more:
            self._after = None
            return
        before, self._after = self._after or 0, page.partitions[-1].partition_id if page.partitions else 0
        if self._after <= before:
            raise ProtocolViolation(
                errno.EPROTO, f"list_partitions: page does not advance past partition {before}"
            )
