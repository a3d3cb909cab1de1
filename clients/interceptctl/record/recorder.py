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

import msgspec

from intercept_client import BlockingOperator, ConnectionEnded, ConnectionLost, TraceRing, WireError
from intercept_protocol import messages
from intercept_protocol.messages import AddressSpaceKind, PartitionSummary, TraceBegun
from intercept_protocol.recording import (
    Chunk,
    End,
    Gap,
    Header,
    Mappings,
    Records,
    Regions,
    StateBegins,
    StateEnds,
    Vmas,
    encode_chunk,
    encode_header,
)
from intercept_protocol.trace import RECORD_SIZE, Kind, kinds_of

PAUSE: Final = 0.05
"""Seconds between two looks at a ring without new records: a busy daemon writes some 4,000 meanwhile, and a
look takes its CPU."""

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
    """Of one partition, into what `opened` returns, which is asked for once the daemon traces it. `proceed`
    is called often, and returns why to stop, or None."""

    def __init__(
        self, opened: Callable[[], BinaryIO], header: Header, proceed: Callable[[], str | None]
    ) -> None:
        self.progress = Progress()
        self._opened = opened
        self._header = header
        self._proceed = proceed
        self._out: BinaryIO | None = None
        self._base = 0
        """Records of earlier daemons: each counts its own from 0."""
        self._next = 0
        self._partition_ended = False
        self._ended = False

    def record(self, operator: BlockingOperator, partition: PartitionSummary, ring: TraceRing) -> None:
        """Record through `ring`, a new one, until `proceed` says stop or the partition ends.

        If the daemon goes away without a word, this raises `ConnectionLost`: call it again with a connection
        to the next.
        """
        why = self._begin(operator, partition.partition_id, ring)
        if why is not None:
            self._write(End(why))
            return
        try:
            self._record(operator, partition, ring)
        except ConnectionLost as lost:
            self._drain(ring)
            if not isinstance(lost, ConnectionEnded):
                raise
            self._write(End(ENDED if self._partition_ended else str(lost)))

    def end(self, why: str) -> None:
        """Nothing follows: no successor of the daemon came. Not if the recording has ended."""
        if self._out is not None and not self._ended:
            self._write(End(why))

    def _begin(self, operator: BlockingOperator, partition_id: int, ring: TraceRing) -> str | None:
        """Have it traced; returns why the recording ends if it cannot go on with this daemon."""
        if self._out is None:
            header = _in_words_of(operator.trace(partition_id, ring), self._header)
            self._header, self._out = header, self._opened()
            self._put(encode_header(header))
            return None
        try:
            if not operator.inspect_partition(partition_id).statistics.restarts:
                return ENDED  # this one is of a daemon that began anew
            begun = operator.trace(partition_id, ring)
        except WireError as refusal:
            if refusal.number != errno.ENOENT:
                raise
            return ENDED
        except ConnectionEnded as ended:
            return str(ended)
        if _in_words_of(begun, self._header) != self._header:
            return "the daemon records in other words now"
        self._base = self._next
        self._write(Gap(self._base, None))
        self.progress.gaps += 1
        return None

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
        """Write what is new by now; True if records were lost before it."""
        gap, end, behind = False, ring.written, 0
        while behind < end:
            lost, first, stored = ring.read()
            if lost:
                gap = True
                self.progress.lost += lost
                self.progress.gaps += 1
                self._write(Gap(self._base + first - lost, lost))
            count = len(stored) // RECORD_SIZE
            behind = first + count
            self._next = self._base + behind
            if count:
                self._write(Records(self._base + first, stored))
                self.progress.records += count
                self._partition_ended = self._partition_ended or Kind.PARTITION_ENDED in kinds_of(stored)
        assert self._out is not None, "it is traced"
        self._out.flush()
        return gap

    def _write(self, chunk: Chunk) -> None:
        self._ended = isinstance(chunk, End)
        self._put(encode_chunk(chunk))

    def _put(self, encoded: bytes) -> None:
        assert self._out is not None, "the header comes first"
        self._out.write(encoded)
        self.progress.size += len(encoded)


def _in_words_of(begun: TraceBegun, header: Header) -> Header:
    return msgspec.structs.replace(
        header, answers=begun.answers, sources=begun.sources, region_kinds=begun.region_kinds
    )


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
