"""What a replay has to know ahead of a recording: the first of two readings.

Owns looking for what the records tell late. A damaged file is noticed here, before anything is repeated.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final

from intercept_protocol.addresses import UaddrRange
from intercept_protocol.recording import Chunk, Records, StateBegins
from intercept_protocol.trace import RECORD_SIZE, Kind, Traced, Words, records_of

LATE_NS: Final = 5_000_000_000
"""How long after a change the daemon may learn of it: an event of the userfaultfd comes after the unmap, and
the comparison looks once a second at a part of the mappings."""
_OF_THE_KERNEL: Final = frozenset({"userfaultfd", "comparison"})


@dataclass
class Survey:
    records: int = 0
    open_at: list[Counter[UaddrRange]] = field(default_factory=list)
    """For each state, the invalidations of notifiers that end after it and did not begin after it."""
    _told: list[tuple[int, int, int, int, bool]] = field(default_factory=list)
    """Record, time, first page and end of each invalidation, and whether no VMM announced it."""

    def told_later(self, record: Traced, start: int, end: int) -> bool:
        """Whether what the daemon learned next of pages in [start, end), and soon, came from the kernel."""
        later = bisect_right(self._told, (record.number, 2**64))
        for _, time_ns, first, behind, of_kernel in self._told[later:]:
            if time_ns - record.time_ns > LATE_NS:
                return False
            if first < end and start < behind:
                return of_kernel
        return False


def survey_of(chunks: Iterable[Chunk], words: Words) -> Survey:
    """Reads all of it; ranges that cannot be raise `RangeError`, at the latest when they are repeated."""
    survey = Survey()
    begun: Counter[UaddrRange] = Counter()
    for chunk in chunks:
        match chunk:
            case StateBegins():
                begun = Counter()
                survey.open_at.append(Counter())
            case Records(first, stored):
                survey.records += len(stored) // RECORD_SIZE
                for record in records_of(first, stored):
                    _note(survey, begun, record, words)
    return survey


def _note(survey: Survey, begun: Counter[UaddrRange], record: Traced, words: Words) -> None:
    if record.kind not in {Kind.INVALIDATION_BEGUN, Kind.INVALIDATION_ENDED, Kind.RANGE_INVALIDATED}:
        return
    start, count = record.values[:2]
    source = words.sources[record.detail] if record.detail < len(words.sources) else ""
    if record.kind != Kind.INVALIDATION_ENDED:
        of_kernel = source in _OF_THE_KERNEL
        survey._told.append((record.number, record.time_ns, start, start + count, of_kernel))
    if record.kind != Kind.RANGE_INVALIDATED and source == "notifier":
        uaddrs = UaddrRange(start=start, end=start + count)
        if record.kind == Kind.INVALIDATION_BEGUN:
            begun[uaddrs] += 1
        elif begun[uaddrs]:
            begun[uaddrs] -= 1
        elif survey.open_at:
            survey.open_at[-1][uaddrs] += 1
