"""The records of a trace against literal bytes, as protocol/RECORDING.md lays them out."""

from __future__ import annotations

import struct

import pytest

from intercept_protocol.outcomes import Access, Answer
from intercept_protocol.trace import (
    ANSWER_CODES,
    ANSWERS,
    NO_MEMORY,
    NO_VP,
    RECORD,
    RECORD_SIZE,
    WAITED,
    Kind,
    Words,
    intercept_of,
    kinds_of,
    records_of,
)


def stored(kind: int, vp_index: int, detail: int, *values: int, time_ns: int = 5) -> bytes:
    padded = [*values, *[0] * (6 - len(values))]
    return b"".join(
        (
            time_ns.to_bytes(8, "little"),
            kind.to_bytes(2, "little"),
            vp_index.to_bytes(2, "little"),
            detail.to_bytes(4, "little"),
            *(value.to_bytes(8, "little") for value in padded),
        )
    )


def test_a_record_has_64_bytes_whose_fields_lie_at_literal_offsets() -> None:
    assert (RECORD_SIZE, RECORD.size) == (64, 64)
    assert RECORD.pack(5, 1, 3, 0x0102, 10, 11, 12, 13, 14, 15) == stored(
        1, 3, 0x0102, 10, 11, 12, 13, 14, 15
    )


def test_records_are_numbered_from_the_first() -> None:
    found = records_of(7, stored(2, NO_VP, 0, 1) + stored(Kind.PARTITION_ENDED, NO_VP, 0, time_ns=6))
    assert [(each.number, each.time_ns, each.kind, each.values[0]) for each in found] == [
        (7, 5, Kind.REGION_ADDED, 1),
        (8, 6, Kind.PARTITION_ENDED, 0),
    ]
    assert kinds_of(stored(2, NO_VP, 0) + stored(17, NO_VP, 0)) == bytes([2, 17])


def test_half_a_record_is_an_error() -> None:
    with pytest.raises(ValueError, match="63 bytes"):
        records_of(0, bytes(63))


def test_an_intercept_has_its_answer_its_access_and_the_times_of_its_stages() -> None:
    detail = ANSWER_CODES[Answer.MAPPED] | Access.WRITE << 8 | WAITED
    data = stored(Kind.INTERCEPT, 3, detail, 0xFEB00, 100, 1 << 32 | 2, 3 << 32 | 4, 5)
    found = intercept_of(records_of(9, data)[0], Words())
    assert found == (9, 5, 3, 0xFEB00, Access.WRITE, "resume", "mapped", True, 100, 1, 2, 3, 4, 5)


def test_what_is_no_memory_access_has_no_gfn() -> None:
    data = stored(Kind.INTERCEPT, 0, ANSWER_CODES[Answer.NOT_MEMORY] | NO_MEMORY, 0, 100)
    found = intercept_of(records_of(0, data)[0], Words())
    assert (found.gfn, found.reason, found.waited) == (None, "not_memory", False)


def test_the_words_of_another_version_are_used() -> None:
    data = stored(Kind.INTERCEPT, 0, 1, 0, 100)
    words = Words(answers=(("resume", "mapped"), ("resume", "some_later_reason")))
    assert intercept_of(records_of(0, data)[0], words).reason == "some_later_reason"
    with pytest.raises(ValueError, match="answer 1, of 1"):
        intercept_of(records_of(0, data)[0], Words(answers=(("resume", "mapped"),)))


def test_every_answer_has_a_code() -> None:
    assert [ANSWERS[ANSWER_CODES[answer]] for answer in Answer] == [answer.value for answer in Answer]


@pytest.mark.parametrize("kind", Kind)
def test_each_kind_fits_into_the_byte_that_is_looked_at(kind: Kind) -> None:
    assert 0 < kind < 256
    assert struct.unpack_from("<H", stored(kind, 0, 0), 8) == (kind,)
