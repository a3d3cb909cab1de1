"""The reader's side of a ring, while its writer overtakes it."""

from __future__ import annotations

import os
import random
import struct
from collections.abc import Iterator
from contextlib import closing

import pytest

from intercept_client import TraceRing
from intercept_protocol.trace import COUNT_PLACE, RECORD, RECORD_SIZE, RING_HEADER, records_of

SLOTS = 256


class Overtaken(TraceRing):
    """Whenever the reader looks how many records there are, so many more were written; the time of each is
    its number."""

    def __init__(self, more: Iterator[int]) -> None:
        super().__init__(SLOTS)
        self._more = more
        self.count = 0

    @property
    def written(self) -> int:
        for number in range(self.count, self.count + next(self._more, 0)):
            record = RECORD.pack(number, 1, 0, 0, 0, 0, 0, 0, 0, 0)
            os.pwrite(self.descriptor, record, RING_HEADER + number % SLOTS * RECORD_SIZE)
            self.count = number + 1
        os.pwrite(self.descriptor, struct.pack("=Q", self.count), COUNT_PLACE)
        return super().written


@pytest.mark.parametrize("seed", range(8))
def test_each_record_is_read_once_or_counted_as_lost_once(seed: int) -> None:
    rng = random.Random(seed)
    more = (rng.choice((0, 0, 1, 7, 100, 255, 256, 257, 300, 600)) for _ in range(40))
    behind = 0
    with closing(Overtaken(more)) as ring:
        for _ in range(60):
            lost, first, stored = ring.read()
            assert first == behind + lost
            records = records_of(first, stored)
            assert [record.time_ns for record in records] == [record.number for record in records]
            assert records or not lost, "a gap is before something"
            behind = first + len(records)
        assert behind == ring.count
