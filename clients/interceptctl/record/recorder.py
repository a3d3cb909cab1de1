"""Writes a partition's recording: its state, then the records of its trace, and after a gap its state again.

Owns the order of the chunks, and when the ring is read: between any two requests. Must not know options, nor
how progress is shown.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import BinaryIO, Final

from intercept_client import BlockingOperator, ConnectionEnded, ConnectionLost, TraceRing, WireError
from intercept_protocol import messages
from intercept_protocol.messages import AddressSpaceKind, PartitionSummary
from intercept_protocol.recording import (
    Chunk,
    End,
    Gap,
    Mappings,
    Records,
    Regions,
    StateBegins,
    StateEnds,
    Vmas,
    encode_chunk,
)
from intercept_protocol.trace import RECORD_SIZE, Kind, kinds_of

PAUSE: Final = 0.01
"""Seconds between two looks at a ring without new records: a busy daemon writes some 500 meanwhile."""

ENDED: Final = "the partition ended"


@dataclass
class Progress:
    """What was written so far."""

    records: int = 0
    lost: int = 0
    """Records that were overwritten before they were read."""
    gaps: int = 0
    size: int = 0
    """Bytes of the file."""


class Recorder:
    """Of one partition, into `out`. `proceed` is called often, and returns why to stop, or None."""

    def __init__(self, out: BinaryIO, proceed: Callable[[], str | None]) -> None:
        self.progress = Progress()
        self._out = out
        self._proceed = proceed
        self._began = False
        self._base = 0
        """Records of earlier daemons: each counts its own from 0."""
        self._next = 0
        self._partition_ended = False

    def record(self, operator: BlockingOperator, partition: PartitionSummary, ring: TraceRing) -> None:
        """Record through `ring`, a new one, until `proceed` says stop or the partition ends.

        If the daemon goes away without a word, this raises `ConnectionLost`: call it again with a connection
        to the next.
        """
        if self._began:
            self._write(Gap(self._next, None))
            self.progress.gaps += 1
            self._base = self._next
        operator.trace(partition.partition_id, ring)
        self._began = True
        try:
            self._record(operator, partition, ring)
        except ConnectionLost as lost:
            self._drain(ring)
            if not isinstance(lost, ConnectionEnded):
                raise
            self._write(End(ENDED if self._partition_ended else str(lost)))

    def _record(self, operator: BlockingOperator, partition: PartitionSummary, ring: TraceRing) -> None:
        why = self._write_state(operator, partition, ring)
        while why is None:
            if self._drain(ring):
                why = self._write_state(operator, partition, ring)
            elif self._partition_ended:
                why = ENDED
            else:
                why = self._proceed()
                _pause(operator)
        self._drain(ring)
        self._write(End(why))

    def _write_state(
        self, operator: BlockingOperator, partition: PartitionSummary, ring: TraceRing
    ) -> str | None:
        """The partition's lists, read while it goes on; returns why to stop, if it must."""
        gap = True
        while gap:
            self._write(StateBegins(self._base + ring.written))
            gap = False
            try:
                for chunk in _state(operator, partition):
                    self._write(chunk)
                    gap = self._drain(ring) or gap
                    if (why := self._proceed()) is not None:
                        return why
            except WireError as refusal:
                if refusal.number != errno.ENOENT:
                    raise
                return ENDED
        self._write(StateEnds(self._base + ring.written))
        return None

    def _drain(self, ring: TraceRing) -> bool:
        """Write all new records; True if some were lost before them."""
        gap = False
        while True:
            lost, first, stored = ring.read()
            if lost:
                gap = True
                self.progress.lost += lost
                self.progress.gaps += 1
                self._write(Gap(self._base + first - lost, lost))
            if not stored:
                self._out.flush()
                return gap
            self._write(Records(self._base + first, stored))
            self._next = self._base + first + len(stored) // RECORD_SIZE
            self.progress.records += len(stored) // RECORD_SIZE
            self._partition_ended = self._partition_ended or Kind.PARTITION_ENDED in kinds_of(stored)

    def _write(self, chunk: Chunk) -> None:
        encoded = encode_chunk(chunk)
        self._out.write(encoded)
        self.progress.size += len(encoded)


def _pause(operator: BlockingOperator) -> None:
    """Let the daemon write. Raises `ConnectionLost` if it is gone: nothing in the ring says so."""
    timeout, operator.timeout = operator.timeout, PAUSE
    with suppress(TimeoutError):
        operator.next_events()
    operator.timeout = timeout


def _state(operator: BlockingOperator, partition: PartitionSummary) -> Iterator[Chunk]:
    """The lists, a page at a time."""
    partition_id = partition.partition_id
    after, more = None, True
    while more:
        regions = operator.call(messages.OperatorListRegions(partition_id=partition_id, after=after))
        yield Regions(regions.regions)
        more = regions.more
        after = regions.regions[-1].start_gfn if more else None
    more = partition.address_space == AddressSpaceKind.DECLARED
    while more:
        vmas = operator.call(messages.OperatorListVmas(partition_id=partition_id, after=after))
        yield Vmas(vmas.vmas)
        more = vmas.more
        after = vmas.vmas[-1].start_uaddr if more else None
    more = True
    while more:
        mappings = operator.call(messages.OperatorListMappings(partition_id=partition_id, after=after))
        yield Mappings(mappings.mappings)
        more = mappings.more
        after = mappings.mappings[-1].start_gfn if more else None
