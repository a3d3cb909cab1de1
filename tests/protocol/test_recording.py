"""The file of a recording: what is written is read again, in any pieces; anything else is refused by name."""

from __future__ import annotations

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from intercept_protocol.messages import MappingView, RegionView, VmaView
from intercept_protocol.recording import (
    CHUNK_LIMIT,
    Chunk,
    End,
    Gap,
    Header,
    Mappings,
    RecordingError,
    RecordingReader,
    Records,
    Regions,
    StateBegins,
    StateEnds,
    Vmas,
    encode_chunk,
    encode_header,
)

HEADER = Header(
    partition_id=3,
    name="web",
    address_space="declared",
    hypervisor="software",
    architecture="x86_64",
    mmio_granularity="vma",
    daemon="1.2",
    wall_clock_ns=10,
    monotonic_ns=4,
)
REGION = RegionView(
    start_gfn=1, page_count=2, start_uaddr=0x3000, kind="mmio", state="live", writable=True,
    executable=False, mapped_gfns=1,
)  # fmt: skip
VMA = VmaView(
    start_uaddr=0x3000, page_count=2, start_pfn=9, readable=True, writable=True, executable=False, io=True
)
MAPPING = MappingView(start_gfn=1, page_count=1, start_uaddr=0x3000, frame=("host", 9), access=3)
CHUNKS: list[Chunk] = [
    StateBegins(5),
    Regions([REGION]),
    Records(5, bytes(64)),
    Vmas([VMA]),
    Mappings([MAPPING]),
    StateEnds(6),
    Records(6, bytes(128)),
    Gap(8, 100),
    StateBegins(108),
    StateEnds(108),
    Gap(108, None),
    Records(108, bytes(64)),
    End("interrupted"),
]
FILE = encode_header(HEADER) + b"".join(map(encode_chunk, CHUNKS))


def read(data: bytes, piece: int = 1 << 16) -> tuple[Header | None, list[Chunk]]:
    reader = RecordingReader()
    chunks = [
        chunk for start in range(0, len(data), piece) for chunk in reader.feed(data[start : start + piece])
    ]
    reader.close()
    return reader.header, chunks


@given(st.integers(1, len(FILE)))
def test_what_was_written_is_read_again_in_pieces_of_any_length(piece: int) -> None:
    assert read(FILE, piece) == (HEADER, CHUNKS)


def test_a_chunk_is_an_array_that_begins_with_its_word() -> None:
    assert msgpack.unpackb(encode_chunk(Gap(8, 100))) == ["gap", 8, 100]
    assert msgpack.unpackb(encode_chunk(Records(6, b"\1" * 64))) == ["records", 6, b"\1" * 64]
    assert msgpack.unpackb(encode_header(HEADER))["format"] == "interceptd recording"


def header(**changed: object) -> bytes:
    fields: dict[str, object] = {**msgpack.unpackb(encode_header(HEADER)), **changed}
    packed: bytes = msgpack.packb(fields)
    return packed


def chunks(*written: object) -> bytes:
    return encode_header(HEADER) + b"".join(map(msgpack.packb, written))


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "the file is empty"),
        (b"%PDF-1.7", "not a recording"),
        (b"\xc1", "not a recording"),
        (header(format="another"), "not a recording"),
        (header(version=2), "version 2; this program reads 1"),
        (header(partition_id="x"), "partition_id"),
        (FILE[:-20], "the file ends within a chunk"),
        (FILE[: -len(encode_chunk(CHUNKS[-1]))], "cut off"),
        (FILE + b"\xc0", "something follows the end"),
        (chunks(["later", 1]), "later"),
        (chunks(["gap"]), "gap|length"),
        (chunks(["records", 0, bytes(63)]), "63 bytes"),
        (chunks(["records", 0, b""]), "0 bytes"),
        (chunks(["records", 0, bytes(64)], ["records", 2, bytes(64)]), "record 1 should follow, not 2"),
        (chunks(["gap", 0, 5], ["records", 4, bytes(64)]), "record 5 should follow, not 4"),
        (encode_header(HEADER) + b"\xc6\x7f\xff\xff\xff", f"more than {CHUNK_LIMIT} bytes"),
        (encode_header(HEADER) + b"\xdd\x7f\xff\xff\xff", f"more than {CHUNK_LIMIT} bytes"),
        (encode_header(HEADER) + b"\xc1", "damaged"),
        (chunks(["regions", [{"start_gfn": 1}]]), "page_count"),
    ],
)
def test_anything_else_is_refused_with_its_cause_and_its_place(data: bytes, why: str) -> None:
    with pytest.raises(RecordingError, match=why) as caught:
        read(data)
    assert 0 <= caught.value.offset <= len(data)


@given(st.integers(0, len(FILE) - 1), st.integers(0, 255))
def test_a_damaged_byte_is_read_or_refused_and_breaks_nothing(place: int, byte: int) -> None:
    damaged = FILE[:place] + bytes([byte]) + FILE[place + 1 :]
    outcome: object
    try:
        outcome = read(damaged)
    except RecordingError as error:
        outcome = error
    assert outcome is not None


def test_text_that_is_no_utf_8_is_escaped() -> None:
    assert msgpack.unpackb(encode_chunk(End("\udcff"))) == ["end", "\\udcff"]
