"""Records in the order in which things were decided, which is not quite that of the file.

Owns putting an intercept where its answer was decided: other things happened while the answer was on its way.
Must not know what records mean beyond that.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from heapq import heappop, heappush
from typing import Final

from intercept_protocol.recording import Chunk, Gap, Records, StateBegins
from intercept_protocol.trace import Kind, Traced, records_of

AHEAD: Final = 4096
"""Records that are read ahead: no answer is on its way for longer."""


def in_order(chunks: Iterable[Chunk]) -> Iterator[Chunk | Traced]:
    """The records one by one, and the other chunks, of which those of a state may come early."""
    waiting: list[tuple[int, bool, int, Traced]] = []
    for chunk in chunks:
        match chunk:
            case Records(first, stored):
                for record in records_of(first, stored):
                    heappush(waiting, _place(record))
                    if len(waiting) > AHEAD:
                        yield heappop(waiting)[-1]
                continue
            case StateBegins() | Gap():
                while waiting:
                    yield heappop(waiting)[-1]
        yield chunk
    while waiting:
        yield heappop(waiting)[-1]


def _place(record: Traced) -> tuple[int, bool, int, Traced]:
    """An intercept comes before the record that was the next to be written when it was decided."""
    earlier = record.values[4] if record.kind == Kind.INTERCEPT else 0
    return record.number - earlier, not earlier, record.number, record
