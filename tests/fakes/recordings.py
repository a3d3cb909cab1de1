"""Recordings for tests: those of real runs, edited, and some made by hand.

Owns reading and writing them with the format's own reader and writer. Must not know what is expected of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

import msgspec

from intercept_protocol.messages import MappingView, RegionView, VmaView
from intercept_protocol.outcomes import Access, Answer
from intercept_protocol.recording import (
    Chunk,
    End,
    Gap,
    Header,
    Mappings,
    RecordingReader,
    Records,
    Regions,
    StateBegins,
    StateEnds,
    Vmas,
    encode_chunk,
    encode_header,
)
from intercept_protocol.trace import (
    ANSWER_CODES,
    NO_MEMORY,
    NO_VP,
    RECORD,
    REGION_KINDS,
    SOURCES,
    Kind,
    Traced,
    backing_number,
    records_of,
)  # fmt: skip

REAL: Final = Path(__file__).parent.parent / "recordings"
HEADER: Final = Header(
    partition_id=1, name="", address_space="declared", hypervisor="software", architecture="x86_64",
    mmio_granularity="vma", daemon="", wall_clock_ns=0, monotonic_ns=0,
)  # fmt: skip
PAGE: Final = 4096


def read(data: bytes) -> tuple[Header, list[Chunk]]:
    reader = RecordingReader()
    chunks = list(reader.feed(data))
    reader.close()
    assert reader.header is not None
    return reader.header, chunks


def written(header: Header, chunks: Sequence[Chunk]) -> bytes:
    return encode_header(header) + b"".join(map(encode_chunk, chunks))


def without(data: bytes, dropped: Callable[[Traced], bool]) -> bytes:
    """A recording without some of its records: those behind them have smaller numbers."""
    header, chunks = read(data)
    edited: list[Chunk] = []
    gone = 0
    for chunk in chunks:
        match chunk:
            case Records(first, stored):
                records = records_of(first, stored)
                kept = [record for record in records if not dropped(record)]
                if kept:
                    edited.append(Records(first - gone, b"".join(map(packed, kept))))
                gone += len(records) - len(kept)
            case StateBegins(number) | StateEnds(number):
                edited.append(type(chunk)(number - gone))
            case _:
                edited.append(chunk)
    return written(header, edited)


def packed(record: Traced) -> bytes:
    return RECORD.pack(record.time_ns, record.kind, record.vp_index, record.detail, *record.values)


class Drawn:
    """A recording made by hand, one record after the other, a microsecond apart."""

    def __init__(self, **header: object) -> None:
        self._header = msgspec.structs.replace(HEADER, **header)
        self._chunks: list[Chunk] = []
        self.count = 0

    def chunk(self, *chunks: Chunk) -> Drawn:
        self._chunks += chunks
        return self

    def state(
        self,
        regions: Sequence[RegionView] = (),
        vmas: Sequence[VmaView] = (),
        mappings: Sequence[MappingView] = (),
    ) -> Drawn:
        return self.chunk(
            StateBegins(self.count),
            Regions(list(regions)),
            Vmas(list(vmas)),
            Mappings(list(mappings)),
            StateEnds(self.count),
        )

    def record(self, kind: int, *values: int, detail: int = 0, vp_index: int = NO_VP) -> Drawn:
        numbers = (*values, *[0] * (6 - len(values)))
        stored = RECORD.pack(self.count * 1000, kind, vp_index, detail, *numbers)
        self.chunk(Records(self.count, stored))
        self.count += 1
        return self

    def gap(self, lost: int | None) -> Drawn:
        self.chunk(Gap(self.count, lost))
        self.count += lost or 0
        return self.state()

    def intercept(
        self, gfn: int | None, answer: Answer, *, vp_index: int = 0, total_ns: int = 1, earlier: int = 0
    ) -> Drawn:
        detail = ANSWER_CODES[answer] | Access.READ << 8 | (NO_MEMORY if gfn is None else 0)
        return self.record(
            Kind.INTERCEPT, gfn or 0, total_ns, 0, 0, earlier, detail=detail, vp_index=vp_index
        )

    def region_added(self, gfn: int, count: int, page: int, kind: str = "movable") -> Drawn:
        rights = Access.READ | Access.WRITE
        return self.record(Kind.REGION_ADDED, gfn, count, page, rights, detail=REGION_KINDS.index(kind))

    def mapped(self, gfn: int, count: int, backing: str = "host") -> Drawn:
        return self.record(Kind.GUEST_MAPPED, gfn, count, 0, 0, backing_number(backing), detail=Access.READ)

    def unmapped(self, gfn: int, count: int) -> Drawn:
        return self.record(Kind.GUEST_UNMAPPED, gfn, count)

    def invalidation(self, kind: Kind, page: int, count: int, source: str = "notifier") -> Drawn:
        return self.record(kind, page, count, detail=SOURCES.index(source))

    def end(self) -> bytes:
        return written(self._header, [*self._chunks, End("enough")])


def region(gfn: int, count: int, page: int, kind: str = "mmio", state: str = "live") -> RegionView:
    return RegionView(
        start_gfn=gfn, page_count=count, start_uaddr=page * PAGE, kind=kind, state=state, writable=True,
        executable=False, mapped_gfns=0,
    )  # fmt: skip


def vma(page: int, count: int, pfn: int, *, readable: bool = True, io: bool = True) -> VmaView:
    return VmaView(
        start_uaddr=page * PAGE, page_count=count, start_pfn=pfn, readable=readable, writable=True,
        executable=False, io=io,
    )  # fmt: skip


def mapping(gfn: int, count: int, page: int, frame: tuple[str, int]) -> MappingView:
    return MappingView(
        start_gfn=gfn, page_count=count, start_uaddr=page * PAGE, frame=frame,
        access=Access.READ | Access.WRITE,
    )  # fmt: skip
