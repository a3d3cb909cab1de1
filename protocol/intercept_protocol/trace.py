"""The records of a trace: fixed-size facts about one partition, for machines.

Owns the 64 bytes of each kind and how a reader turns them into values; protocol/RECORDING.md specifies them.
Must not know where records are kept (`recording`, the daemon's ring), nor who reads them.

A record is written on the daemon's hot path, so its writer calls `RECORD.pack_into` with a `Kind` itself.
Answers and sources are numbers there, indexes into `ANSWERS` and `SOURCES`, which travel with the trace: a
reader of another version reads the words of the writer's.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from enum import IntEnum
from functools import lru_cache
from hashlib import blake2b
from typing import Final, NamedTuple

from .outcomes import Access, Answer

RECORD: Final = struct.Struct("<QHHI6Q")
"""Time, kind, VP, detail, and six numbers whose meaning depends on the kind."""
RECORD_SIZE: Final = RECORD.size
_KIND_PLACE: Final = 8
MAGIC: Final = b"ICPTRACE"
"""The first bytes of a ring. Then a u32 version and a u32 with the size of a record."""
RING_VERSION: Final = 1
RECORDS_AT_LEAST: Final = 256
RECORDS_LIMIT: Final = 1 << 22
"""Of one ring: 256 MiB, which its reader provides."""
RING_HEADER: Final = 4096
"""Bytes before the first record of a ring."""
COUNT_PLACE: Final = 16
"""Where a ring has the u64 of how many records were ever written. Record n is in slot n modulo the number of
slots, a power of two; only the last so many are there. The count is one aligned store, made after those of
the record: on x86-64 a reader sees them in this order."""
NO_VP: Final = 0xFFFF
"""In place of a vp_index, which is below 256."""
ANSWERS: Final = tuple((str(answer.outcome), answer.reason) for answer in Answer)
"""The (outcome, reason) pairs; a record has an index into them."""
ANSWER_CODES: Final = {answer: code for code, answer in enumerate(Answer)}
SOURCES: Final = ("notifier", "unmap_vma", "protect_vma", "userfaultfd", "comparison")
"""What may announce an invalidation."""
REGION_KINDS: Final = ("mmio", "movable", "pinned")


@lru_cache(1024)
def backing_number(backing: str) -> int:
    """What stands for a backing in a record: the first 8 bytes of its name's BLAKE2b (RFC 7693)."""
    return int.from_bytes(blake2b(backing.encode(errors="surrogateescape"), digest_size=8).digest(), "little")


class Kind(IntEnum):
    """What a record tells. The numbers are stable; later versions add kinds, which readers skip."""

    INTERCEPT = 1
    REGION_ADDED = 2
    REGION_REMOVED = 3
    VMA_MAPPED = 4
    VMA_UNMAPPED = 5
    VMA_PROTECTED = 6
    BACKED = 7
    INVALIDATION_BEGUN = 8
    INVALIDATION_ENDED = 9
    RANGE_INVALIDATED = 10
    INVALIDATION_SERVED = 11
    GUEST_MAPPED = 12
    GUEST_UNMAPPED = 13
    VP_ATTACHED = 14
    VP_DETACHED = 15
    POLICY_SET = 16
    PARTITION_ENDED = 17
    REGION_DANGLING = 18


class Words(NamedTuple):
    """What the numbers of a trace stand for; the writer's, which may be of another version."""

    answers: Sequence[tuple[str, str]] = ANSWERS
    sources: Sequence[str] = SOURCES
    region_kinds: Sequence[str] = REGION_KINDS


class Traced(NamedTuple):
    """One record as it is stored, with its number: the count of records before it."""

    number: int
    time_ns: int
    """CLOCK_MONOTONIC."""
    kind: int
    vp_index: int
    detail: int
    values: tuple[int, int, int, int, int, int]


class Intercept(NamedTuple):
    """An answered intercept. Times are in ns; `time_ns` is that of the answer."""

    number: int
    time_ns: int
    vp_index: int
    gfn: int | None
    """None if the message was of no memory access."""
    access: Access
    outcome: str
    reason: str
    waited: bool
    total_ns: int
    decode_ns: int
    wait_ns: int
    resolve_ns: int
    map_ns: int
    decided_earlier: int
    """How many records were written between the decision and the answer."""


def records_of(first_number: int, stored: bytes | memoryview) -> list[Traced]:
    """The records in `stored`, of which the first has that number. Raises ValueError for half a record."""
    if len(stored) % RECORD_SIZE:
        raise ValueError(f"{len(stored)} bytes are no whole number of records of {RECORD_SIZE} bytes")
    return [
        Traced(number, time_ns, kind, vp_index, detail, (a, b, c, d, e, f))
        for number, (time_ns, kind, vp_index, detail, a, b, c, d, e, f) in enumerate(
            RECORD.iter_unpack(stored), first_number
        )
    ]


WAITED: Final = 1 << 16
NO_MEMORY: Final = 1 << 17
"""Flags in an intercept's detail, above the answer (bits 0 to 7) and the access (bits 8 to 15)."""
IO: Final = 1 << 3
"""A flag beside the access bits in the detail of `VMA_MAPPED` and `BACKED`: device memory."""
_HALF: Final = (1 << 32) - 1


def intercept_of(record: Traced, words: Words) -> Intercept:
    """An `INTERCEPT` record. Raises ValueError for an answer that `words` lacks."""
    code = record.detail & 0xFF
    if code >= len(words.answers):
        raise ValueError(f"record {record.number} has answer {code}, of {len(words.answers)}")
    outcome, reason = words.answers[code]
    gfn, total_ns, decode_wait, resolve_map, decided_earlier, _ = record.values
    return Intercept(
        record.number,
        record.time_ns,
        record.vp_index,
        None if record.detail & NO_MEMORY else gfn,
        Access(record.detail >> 8 & 0x7),
        outcome,
        reason,
        bool(record.detail & WAITED),
        total_ns,
        decode_wait >> 32,
        decode_wait & _HALF,
        resolve_map >> 32,
        resolve_map & _HALF,
        decided_earlier,
    )


def kinds_of(stored: bytes) -> bytes:
    """The kind of each record in `stored`: all are below 256, so one byte of two is enough."""
    return stored[_KIND_PLACE::RECORD_SIZE]
