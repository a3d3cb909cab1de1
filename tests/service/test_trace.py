"""How a fact becomes a record of a trace."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass

import pytest

import intercept_client
from intercept_protocol.addresses import UaddrRange
from intercept_protocol.outcomes import Access, Answer
from intercept_protocol.trace import (
    IO,
    NO_VP,
    RECORDS_AT_LEAST,
    Intercept,
    Kind,
    Traced,
    Words,
    backing_number,
    intercept_of,
    records_of,
)
from interceptd.pages.mapping import Extent, Frame, Mapping
from interceptd.telemetry.trace import DECODE, MAP, RESOLVE, WAIT, Trace, TraceRing

RIGHTS = Access.READ | Access.WRITE
FRAME = Frame("host", 70)
LONGEST = (1 << 32) - 1


class Reader:
    """An operator's ring, and the trace that fills it."""

    def __init__(self, ring: intercept_client.TraceRing, trace: Trace) -> None:
        self._ring = ring
        self.trace = trace

    def records(self) -> list[Traced]:
        _, first, stored = self._ring.read()
        return records_of(first, stored)


@pytest.fixture
def reader() -> Iterator[Reader]:
    with (
        closing(intercept_client.TraceRing(RECORDS_AT_LEAST)) as ring,
        closing(Trace(TraceRing(ring.descriptor))) as trace,
    ):
        yield Reader(ring, trace)


@dataclass
class Took:
    spent: list[int]
    waited: bool = True
    decided_at: int | None = None


def test_a_first_touch_says_what_backs_the_page_and_what_is_mapped(reader: Reader) -> None:
    uaddrs = UaddrRange(start=16, end=24)
    for io in (True, False, None):
        reader.trace.backed(Extent(uaddrs, FRAME, RIGHTS, io, uaddrs))
    reader.trace.mapped(Mapping(256, 264, FRAME, 16, RIGHTS))
    reader.trace.mapped(Mapping(256, 264, None, 16, Access.NONE))
    number = backing_number("host")
    assert [(each.kind, each.vp_index, each.detail, each.values) for each in reader.records()] == [
        (Kind.BACKED, NO_VP, RIGHTS | IO, (16, 8, 70, number, 0, 0)),
        (Kind.BACKED, NO_VP, RIGHTS, (16, 8, 70, number, 0, 0)),
        (Kind.BACKED, NO_VP, RIGHTS, (16, 8, 70, number, 0, 0)),
        (Kind.GUEST_MAPPED, NO_VP, RIGHTS, (256, 8, 16, 70, number, 0)),
        (Kind.GUEST_MAPPED, NO_VP, 0, (256, 8, 16, 0, 0, 0)),
    ]


def intercept(reader: Reader, took_ns: int, spent: list[int]) -> Intercept:
    reader.trace.intercept(5, 0, (256, Access.READ), Answer.MAPPED, took_ns, Took(spent))
    [record] = reader.records()
    return intercept_of(record, Words())


@pytest.mark.parametrize("wait", [3, LONGEST, LONGEST + 1, 60 * 10**9])
def test_a_long_stage_of_an_intercept_does_not_reach_into_another(reader: Reader, wait: int) -> None:
    spent = [0, 0, 0, 0]
    spent[DECODE], spent[WAIT], spent[RESOLVE], spent[MAP] = 1, wait, LONGEST if wait > LONGEST else 4, 5
    told = intercept(reader, sum(spent), spent)
    assert told.total_ns == sum(spent)
    assert (told.decode_ns, told.wait_ns) == (1, min(wait, LONGEST))
    assert (told.resolve_ns, told.map_ns) == (spent[RESOLVE], 5)
