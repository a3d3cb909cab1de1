"""The file of a recording, sans I/O: chunks to bytes, and bytes to chunks.

Owns the format, which protocol/RECORDING.md specifies, and the bounds that a reader keeps. Must not know what
a record means (`trace`), nor where the bytes come from. Neither side needs the whole file in memory.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from typing import Final, TypeVar

import msgpack
import msgspec

from ._frames import FrameScanner, MessageLimits
from .errors import ProtocolViolation
from .messages.inspection import MappingView, RegionView, VmaView
from .text import visible
from .trace import ANSWERS, RECORD_SIZE, REGION_KINDS, SOURCES, Words

FORMAT: Final = "interceptd recording"
VERSION: Final = 1
CHUNK_LIMIT: Final = 1 << 20
"""Bytes of one chunk; a reader refuses a longer one."""
RECORDS_PER_CHUNK: Final = 8192
VIEWS_PER_CHUNK: Final = 256


class RecordingError(Exception):
    """The file is truncated, damaged, of another format, or not a recording. `offset` is in bytes."""

    def __init__(self, offset: int, why: str) -> None:
        super().__init__(f"at byte {offset}: {why}")
        self.offset = offset


class Header(msgspec.Struct, frozen=True, kw_only=True):
    """The first chunk: what was recorded, and what the numbers in its records stand for."""

    partition_id: int
    name: str
    address_space: str
    hypervisor: str
    architecture: str
    mmio_granularity: str
    daemon: str
    """The version that wrote the records."""
    wall_clock_ns: int
    """Since the epoch, when CLOCK_MONOTONIC was `monotonic_ns`."""
    monotonic_ns: int
    answers: tuple[tuple[str, str], ...] = ANSWERS
    sources: tuple[str, ...] = SOURCES
    region_kinds: tuple[str, ...] = REGION_KINDS

    @property
    def words(self) -> Words:
        return Words(self.answers, self.sources, self.region_kinds)


class StateBegins(msgspec.Struct, frozen=True, tag="state", array_like=True):
    """The partition's state follows. It holds once every record from `number` on up to the `StateEnds` has
    been applied to it: the lists are read while the guest runs."""

    number: int


class Regions(msgspec.Struct, frozen=True, tag="regions", array_like=True):
    """Some regions of the state."""

    regions: list[RegionView]


class Vmas(msgspec.Struct, frozen=True, tag="vmas", array_like=True):
    """Some VMAs of the state, declared or seen behind the guest's mappings."""

    vmas: list[VmaView]


class Mappings(msgspec.Struct, frozen=True, tag="mappings", array_like=True):
    """Some of what the guest reaches in the state."""

    mappings: list[MappingView]


class StateEnds(msgspec.Struct, frozen=True, tag="state_end", array_like=True):
    """From record `number` on, the state and the records say what holds."""

    number: int


class Records(msgspec.Struct, frozen=True, tag="records", array_like=True):
    """Records without a gap; the first has this number."""

    first_number: int
    stored: bytes


class Gap(msgspec.Struct, frozen=True, tag="gap", array_like=True):
    """So many records are missing: the reader was too slow. If it is None, another daemon took the partition
    over, and the last records of the one before may be missing. A new state follows."""

    first_number: int
    count: int | None


class End(msgspec.Struct, frozen=True, tag="end", array_like=True):
    """The last chunk: why the recording ended."""

    reason: str


Chunk = StateBegins | Regions | Vmas | Mappings | StateEnds | Records | Gap | End
_Type = TypeVar("_Type")
_pack: Callable[[object], bytes] = msgpack.Packer(unicode_errors="backslashreplace").pack
_LIMITS: Final = MessageLimits(CHUNK_LIMIT, "chunk_bytes", CHUNK_LIMIT, "chunk_bytes")


def encode_header(header: Header) -> bytes:
    return _pack({"format": FORMAT, "version": VERSION, **msgspec.to_builtins(header)})


def encode_chunk(chunk: Chunk) -> bytes:
    return _pack(msgspec.to_builtins(chunk, builtin_types=(bytes,)))


class RecordingReader:
    """Turns the bytes of a file into its header and chunks. Feed it, take what is whole, and `close` it."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._offset = 0
        self._scanner = FrameScanner(_LIMITS)
        self._next_number: int | None = None
        self._ended = False
        self.header: Header | None = None
        """None until its bytes are here."""

    def feed(self, data: bytes) -> Iterator[Chunk]:
        """The chunks that `data` completes. Raises `RecordingError`."""
        self._buffer += data
        while (end := self._end_of_value()) is not None:
            frame = bytes(self._buffer[:end])
            del self._buffer[:end]
            self._scanner = FrameScanner(_LIMITS)
            if self.header is None:
                self.header = self._decode_header(frame)
            else:
                chunk = self._decode(frame)
                self._check_order(chunk)
                yield chunk
            self._offset += end

    def close(self) -> None:
        """Nothing follows. Raises `RecordingError` if something is missing."""
        if self._buffer or self.header is None:
            raise self._error("the file ends within a chunk" if self._buffer else "the file is empty")
        if not self._ended:
            raise self._error("the end is missing: the recording was cut off")

    def _end_of_value(self) -> int | None:
        try:
            return self._scanner.scan(self._buffer) if self._buffer else None
        except ProtocolViolation as violation:
            if violation.number == errno.EMSGSIZE:
                raise self._error(f"a chunk has more than {CHUNK_LIMIT} bytes") from None
            raise self._error("this is not a recording" if self.header is None else "damaged") from None

    def _decode_header(self, frame: bytes) -> Header:
        value = self._value(frame)
        if not isinstance(value, dict) or value.get("format") != FORMAT:
            raise self._error("this is not a recording")
        version = value.get("version")
        if version != VERSION:
            raise self._error(f"the format has version {version!r:.40}; this program reads {VERSION}")
        return self._convert(value, Header)

    def _decode(self, frame: bytes) -> Chunk:
        value = self._value(frame)
        if self._ended:
            raise self._error("something follows the end")
        return self._convert(value, Chunk)  # type: ignore[arg-type]

    def _value(self, frame: bytes) -> object:
        try:
            return msgpack.unpackb(frame, strict_map_key=False)
        except (ValueError, TypeError, msgpack.exceptions.UnpackException):
            raise self._error("this is not a recording" if self.header is None else "damaged") from None

    def _convert(self, value: object, wanted: type[_Type]) -> _Type:
        try:
            return msgspec.convert(value, wanted, builtin_types=(bytes,))
        except (msgspec.ValidationError, OverflowError) as error:
            raise self._error(visible(str(error))[:200]) from None

    def _check_order(self, chunk: Chunk) -> None:
        match chunk:
            case Records(first, stored):
                if not stored or len(stored) % RECORD_SIZE:
                    raise self._error(f"{len(stored)} bytes are no whole number of records")
                self._expect(first)
                self._next_number = first + len(stored) // RECORD_SIZE
            case Gap(first, count):
                self._expect(first)
                self._next_number = first + (count or 0)
            case End():
                self._ended = True

    def _expect(self, first: int) -> None:
        if self._next_number is not None and first != self._next_number:
            raise self._error(f"record {self._next_number} should follow, not {first}")

    def _error(self, why: str) -> RecordingError:
        return RecordingError(self._offset, why)
