"""The boundary scan against msgpack itself, and its limits to the byte."""

from __future__ import annotations

import errno

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from intercept_protocol._frames import (
    DEPTH_LIMIT,
    MESSAGE_LIMIT,
    REQUEST_VALUES,
    REQUEST_VALUES_VMM,
    FrameScanner,
    MessageLimits,
)
from intercept_protocol.errors import ProtocolViolation

scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False)
    | st.text(max_size=300)
    | st.binary(max_size=300)
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=20) | st.dictionaries(st.text(max_size=40), inner, max_size=20),
    max_leaves=30,
)

ONE_OF_EACH_FORMAT = [
    "00", "7f", "80", "8101c0", "90", "92c0c0", "a0", "a161", "bf" + "61" * 31, "c0", "c2", "c3",
    "c400", "c40161", "c500020000", "c6000000020000", "ca00000000", "cb0000000000000000",
    "cc80", "cd0100", "ce00010000", "cf0000000100000000",
    "d080", "d18000", "d280000000", "d38000000000000000",
    "d90161", "da000161", "db0000000161",
    "dc0001c0", "dd00000001c0", "de000101c0", "df0000000101c0", "e0", "ff",
]  # fmt: skip


def refusal(data: bytes) -> tuple[int, int]:
    """Feed byte by byte; how many bytes it took to refuse, and with which number."""
    scanner = FrameScanner()
    for size in range(len(data) + 1):
        try:
            scanner.scan(data[:size])
        except ProtocolViolation as violation:
            return size, violation.number
    raise AssertionError("nothing was refused")


def scan_or_refuse(data: bytes) -> int | str | None:
    try:
        return FrameScanner().scan(data)
    except ProtocolViolation:
        return "refused"


def msgpack_end(data: bytes) -> int | str | None:
    """The same from msgpack's own parser, which steps over a value without making it."""
    unpacker = msgpack.Unpacker()
    unpacker.feed(data)
    try:
        unpacker.skip()
    except msgpack.OutOfData:
        return None
    except ValueError:
        return "no MessagePack"
    return int(unpacker.tell())


# ---------------------------------------------------------------- where a value ends


@pytest.mark.parametrize("encoded", ONE_OF_EACH_FORMAT)
def test_scan_of_each_format_ends_where_msgpack_ends(encoded: str) -> None:
    data = bytes.fromhex(encoded)
    msgpack.unpackb(data, strict_map_key=False)  # the oracle: these bytes are one whole value

    assert FrameScanner().scan(data + b"\x00") == len(data)


@pytest.mark.parametrize("encoded", ONE_OF_EACH_FORMAT)
def test_scan_of_each_format_waits_for_the_last_byte(encoded: str) -> None:
    data = bytes.fromhex(encoded)
    scanner = FrameScanner()

    assert [scanner.scan(data[:size]) for size in range(len(data))] == [None] * len(data)
    assert scanner.scan(data) == len(data)


@given(values, values)
def test_scan_of_a_pipelined_stream_ends_behind_the_first_value(first: object, second: object) -> None:
    one, two = msgpack.packb(first), msgpack.packb(second)

    assert FrameScanner().scan(one + two) == len(one)


@given(values)
def test_a_scan_that_reads_no_more_than_is_missing_ends_with_the_value(value: object) -> None:
    """Most tokens take two reads, a header and the rest; an array or a map has nothing but its header."""
    encoded = msgpack.packb(value)
    scanner, available = FrameScanner(), 0
    while scanner.scan(encoded[:available]) is None:
        assert 1 <= scanner.missing_bytes <= len(encoded) - available
        available += scanner.missing_bytes
    assert available == len(encoded)


def test_the_whole_rest_of_a_long_text_is_known_to_be_missing() -> None:
    encoded = msgpack.packb(["x" * 1000, 1])
    scanner = FrameScanner()
    assert (scanner.scan(encoded[:5]), scanner.missing_bytes) == (None, len(encoded) - 5)


@given(values, st.data())
def test_scan_resumes_at_every_split(value: object, data: st.DataObject) -> None:
    encoded = msgpack.packb(value)
    cuts = sorted(data.draw(st.sets(st.integers(0, len(encoded) - 1), max_size=12)))
    scanner = FrameScanner()

    assert [scanner.scan(encoded[:cut]) for cut in cuts] == [None] * len(cuts)
    assert scanner.scan(encoded) == len(encoded)


@given(st.binary(max_size=64))
def test_scan_of_anything_agrees_with_msgpack_or_refuses(data: bytes) -> None:
    assert scan_or_refuse(data) in ("refused", msgpack_end(data))


# ---------------------------------------------------------------- limits


def bin32(length: int) -> bytes:
    return b"\xc6" + length.to_bytes(4) + bytes(length)


def test_value_of_exactly_the_limit_is_taken() -> None:
    data = bin32(MESSAGE_LIMIT - 5)

    assert FrameScanner().scan(data) == MESSAGE_LIMIT == 65_536


def test_value_of_one_byte_over_the_limit_is_refused_at_its_header() -> None:
    assert refusal(bin32(MESSAGE_LIMIT - 4)) == (5, errno.EMSGSIZE)


def test_many_small_values_of_exactly_the_limit_are_taken() -> None:
    data = b"\xdc" + (MESSAGE_LIMIT - 3).to_bytes(2) + b"\xc0" * (MESSAGE_LIMIT - 3)

    assert FrameScanner().scan(data) == MESSAGE_LIMIT


def test_many_small_values_that_cannot_fit_are_refused_at_the_count() -> None:
    data = b"\xdc" + (MESSAGE_LIMIT - 2).to_bytes(2) + b"\xc0" * (MESSAGE_LIMIT - 2)

    assert refusal(data) == (3, errno.EMSGSIZE)


@pytest.mark.parametrize(
    "encoded", ["c6ffffffff", "dbffffffff", "ddffffffff", "dfffffffff", "df00008000", "deffff"]
)
def test_huge_announcement_is_refused_at_its_header(encoded: str) -> None:
    data = bytes.fromhex(encoded)

    assert refusal(data + b"\xc0" * 8) == (len(data), errno.EMSGSIZE)


def test_announcement_counts_what_the_open_containers_still_need() -> None:
    inner = b"\xc5" + (MESSAGE_LIMIT - 4).to_bytes(2)  # would fit, were nothing to come behind it

    assert refusal(b"\x92" + inner + bytes(8)) == (4, errno.EMSGSIZE)


def test_refusal_at_the_limit_names_it() -> None:
    with pytest.raises(ProtocolViolation) as caught:
        FrameScanner().scan(b"\xc6\xff\xff\xff\xff")

    assert caught.value.details == {"limit": "message_bytes"}


def test_nesting_to_the_limit_is_taken() -> None:
    data = b"\x91" * DEPTH_LIMIT + b"\xc0"

    assert FrameScanner().scan(data) == 17


def test_empty_container_within_the_last_level_is_taken() -> None:
    assert FrameScanner().scan(b"\x91" * DEPTH_LIMIT + b"\x90") == 17


@pytest.mark.parametrize("opening", [b"\x91", b"\xdc\x00\x01", b"\x81\xc0"])
def test_nesting_over_the_limit_is_refused_when_it_opens(opening: bytes) -> None:
    assert refusal(b"\x91" * DEPTH_LIMIT + opening)[1] == errno.EBADMSG


def test_nesting_is_counted_from_zero_after_a_closed_container() -> None:
    data = b"\x92" + b"\x91" * (DEPTH_LIMIT - 1) + b"\xc0" + b"\x91" * (DEPTH_LIMIT - 1) + b"\xc0"

    assert FrameScanner().scan(data) == len(data)


@pytest.mark.parametrize("kind", [0xC1, 0xC7, 0xC8, 0xC9, 0xD4, 0xD5, 0xD6, 0xD7, 0xD8])
def test_ext_types_and_the_unused_byte_are_refused_at_their_first_byte(kind: int) -> None:
    assert refusal(bytes([0x92, 0xC0, kind, 0, 0])) == (3, errno.EBADMSG)


@pytest.mark.parametrize("limit", [REQUEST_VALUES, REQUEST_VALUES_VMM], ids=lambda limit: limit.name)
def test_one_value_too_many_is_refused_at_the_header_that_announces_it(limit: MessageLimits) -> None:
    """The array itself is a value, too."""
    assert FrameScanner(limit).scan(b"\xdc" + (limit.values - 1).to_bytes(2)) is None
    with pytest.raises(ProtocolViolation) as refused:
        FrameScanner(limit).scan(b"\xdc" + limit.values.to_bytes(2))
    assert (refused.value.number, refused.value.details) == (errno.EMSGSIZE, {"limit": limit.name})
