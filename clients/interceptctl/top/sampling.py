"""Fetches what one frame needs from the daemon.

Owns which requests that takes; must not know rates.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from enum import Enum
from itertools import islice
from typing import Final, TypeVar

from intercept_client import BlockingOperator
from intercept_protocol.errors import WireError
from intercept_protocol.messages import (
    Call,
    Histograms,
    InspectPartition,
    VpHistogram,
)
from interceptctl import restored, silence

from .rates import Counted, Sample, VpCounted

ASKED_ABOUT: Final = 256
"""At most this many partitions are inspected, each by a request; the lowest ids first."""
_ReplyT = TypeVar("_ReplyT")


class View(Enum):
    PARTITIONS = "partitions"
    VPS = "virtual_processors"


def sample(operator: BlockingOperator, view: View) -> Sample:
    """The current counters that the view shows."""
    daemon = operator.statistics()
    listed = (each for each in operator.list_partitions() if not silence.waits_for_vmm(each))
    summaries = list(islice(listed, ASKED_ABOUT))
    if view is View.VPS:
        vps = {
            (summary.partition_id, histogram.vp_index): VpCounted(summary, histogram)
            for summary in summaries
            for histogram in _histograms(operator, summary.partition_id)
        }
        return Sample(daemon, vps=vps)
    partitions: dict[int, Counted] = {}
    for summary in summaries:
        seen = _unless_ended(operator, InspectPartition(partition_id=summary.partition_id))
        if seen is not None:
            now = seen.statistics.restore
            pages = None if now is None else restored.brought_in(now)
            partitions[summary.partition_id] = Counted(seen.summary, seen.statistics.intercepts, pages)
    return Sample(daemon, partitions)


def _histograms(operator: BlockingOperator, partition_id: int) -> Iterator[VpHistogram]:
    """The histograms of every VP of a partition, fetched page by page."""
    after: int | None = None
    while (page := _unless_ended(operator, Histograms(partition_id=partition_id, after=after))) is not None:
        yield from page.virtual_processors
        if not page.more or not page.virtual_processors:
            return
        after = page.virtual_processors[-1].vp_index


def _unless_ended(operator: BlockingOperator, call: Call[_ReplyT]) -> _ReplyT | None:
    """The reply about a partition, or None if it has ended since it was listed."""
    try:
        return operator.call(call)
    except WireError as error:
        if error.number != errno.ENOENT:
            raise
        return None
