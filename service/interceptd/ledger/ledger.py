"""A ledger: memory that outlives the daemon, one memfd for each VMM's connections.

Owns the layout: a header, the inboxes, and an append-only log in one of two halves. Must not know what the
records mean.

| offset | what |
|---|---|
| 0 | `ICPTKEPT`, u32 format, u32 restarts |
| 16 | u64 where the log ends: the commit word. The log begins where that half begins |
| 24 | u32 msgid of the last request to the VMM's hypervisor, u32 whether the ledger is void |
| 64 | one userfaultfd event (32 bytes) that was read and may not be in the log |
| 4 KiB | the inboxes, `INBOX_AREA` |
| behind them | the two halves |

What a process stores in the map outlives it, in the order of its stores. A frame of the log is a u32 length
and as many bytes. It is written first, and counts once the commit word covers it. Setting that word is one
aligned store of 8 bytes, which cannot be torn, so there is no checksum. (`struct.pack_into` with `<` stores
byte by byte: 10 of 3,000 kills tore it.) A compaction writes a shorter log with the same meaning to the other
half, and moves the word there.
"""

from __future__ import annotations

import mmap
import os
import sys
from collections.abc import Iterator
from contextlib import suppress
from struct import Struct

from interceptd.ledger.inbox import INBOX_AREA, Inbox, inbox_place
from interceptd.ledger.ledger_format import LEDGER_FORMAT, READABLE_FORMATS

MAGIC = b"ICPTKEPT"
PAGE = 4096
EVENT_PLACE = slice(64, 96)
HALF = 448 << 20
"""Bytes of one half of the log. A million regions take 60 MB, a million mappings 50."""
_LOG = PAGE + INBOX_AREA
SIZE = _LOG + 2 * HALF
"""The file is sparse and mapped whole; only touched pages take memory."""
_PIECE = 4 << 20
"""Bytes that one step of `give_back` frees, in 0.7 ms."""
_LENGTH = Struct("=I")
_LENGTH_BYTES = _LENGTH.size
_FORMAT, _RESTARTS, _MSGID, _VOID = 0, 1, 4, 5
"""Indices of the u32 words from offset 8 on."""


class LedgerUnreadable(Exception):
    """It is not a ledger, has a format that this version cannot read, or makes no sense."""


class LedgerVoid(LedgerUnreadable):
    """Its daemon made it void: the partition ended, or could not be recorded completely."""


class LedgerFull(Exception):
    """The log has no room: a compaction was too slow."""


class Ledger:
    """Owns the descriptor and its map."""

    __slots__ = ("_end", "_end_word", "_limit", "_map", "_view", "_words", "descriptor")

    def __init__(self, descriptor: int) -> None:
        """Use `create` or `open`."""
        self.descriptor = descriptor
        self._map = mmap.mmap(descriptor, SIZE)
        self._view = memoryview(self._map)
        self._words = self._view[8:32].cast("I")
        self._end_word = self._view[16:24].cast("Q")
        self._end = self._end_word[0]
        self._limit = _half(self._end).stop

    @classmethod
    def create(cls) -> Ledger:
        """A new one. Raises `OSError`."""
        descriptor = os.memfd_create("interceptd-ledger", os.MFD_CLOEXEC)
        try:
            os.ftruncate(descriptor, SIZE)
            os.pwrite(descriptor, _LOG.to_bytes(8, sys.byteorder), 16)
            os.pwrite(descriptor, MAGIC + LEDGER_FORMAT.to_bytes(4, sys.byteorder), 0)
            return cls(descriptor)
        except BaseException:
            os.close(descriptor)
            raise

    @classmethod
    def open(cls, descriptor: int) -> Ledger:
        """A predecessor's, which may have died in a compaction: call `give_back`. Raises `LedgerUnreadable`,
        and `OSError` if the system refuses the map; then the descriptor stays the caller's."""
        try:
            head = os.pread(descriptor, 32, 0)
        except OSError:  # not a file
            head = b""
        if len(head) < 32 or not head.startswith(MAGIC):
            raise LedgerUnreadable("it is not a ledger")
        found = int.from_bytes(head[8:12], sys.byteorder)
        if found not in READABLE_FORMATS:
            known = ", ".join(map(str, sorted(READABLE_FORMATS)))
            raise LedgerUnreadable(f"it has format {found}, and this version reads {known}")
        if os.fstat(descriptor).st_size != SIZE:
            raise LedgerUnreadable("it has another size than a ledger of its format")
        if not _LOG <= int.from_bytes(head[16:24], sys.byteorder) < SIZE:
            raise LedgerUnreadable("its log ends outside it")
        if any(head[28:32]):
            raise LedgerVoid("its daemon ended it, or gave it up")
        return cls(descriptor)

    @property
    def restarts(self) -> int:
        """How many daemons have taken it over."""
        return self._words[_RESTARTS]

    def count_restart(self) -> None:
        self._words[_RESTARTS] += 1

    @property
    def last_msgid(self) -> int:
        """Of the last request to the VMM's hypervisor."""
        return self._words[_MSGID]

    @last_msgid.setter
    def last_msgid(self, msgid: int) -> None:
        self._words[_MSGID] = msgid

    def void(self) -> None:
        """Keep successors from taking it over."""
        self._words[_VOID] = 1

    @property
    def event(self) -> memoryview:
        """Where a userfaultfd event is read to; all zero once that is in the log."""
        return self._view[EVENT_PLACE]

    def inbox(self, number: int) -> Inbox:
        """One of the inboxes, see `inbox_place`."""
        start, end = inbox_place(number)
        return Inbox(number, self._view[PAGE + start : PAGE + end])

    # ------------------------------------------------ the log

    @property
    def log_bytes(self) -> int:
        return self._end - self._limit + HALF

    def append(self, record: bytes) -> int:
        """Add a record; returns the length of the log in bytes. Raises `LedgerFull`."""
        end = self._write(self._end, record, self._limit)
        self._end_word[0] = self._end = end  # one aligned store: from here on the record counts
        return end - self._limit + HALF

    def frames(self, at: int | None = None) -> Iterator[tuple[bytes, int]]:
        """The records from the beginning or from `at`, each with the place behind it. Includes records that
        are appended during the iteration. Raises `LedgerUnreadable` for a malformed frame."""
        if at is None:
            at = self._limit - HALF
        while at != self._end:
            start = at + _LENGTH_BYTES
            if start > self._end:
                raise LedgerUnreadable("a frame reaches beyond the log")
            (length,) = _LENGTH.unpack_from(self._view, at)
            at = start + length
            if at > self._end:
                raise LedgerUnreadable("a frame reaches beyond the log")
            yield bytes(self._view[start:at]), at

    def rewrite(self) -> Rewriting:
        """Begin a new log in the other half."""
        return Rewriting(self)

    def give_back(self) -> Iterator[None]:
        """Free the memory of the half that the log is not in, one piece per step of the iteration. A piece
        that cannot be freed is only wasted."""
        half = _half(self._limit % SIZE)
        for start in range(half.start, half.stop, _PIECE):
            with suppress(OSError, ValueError):  # the ledger may have been closed meanwhile
                self._map.madvise(mmap.MADV_REMOVE, start, _PIECE)
            yield

    def close(self) -> None:
        """Unmap and close it. Idempotent. Inboxes in use keep the map, and with it the memory."""
        if self.descriptor < 0:
            return
        for view in (self._words, self._end_word, self._view):
            view.release()
        with suppress(BufferError):  # an inbox is in use
            self._map.close()
        os.close(self.descriptor)
        self.descriptor = -1

    def _write(self, at: int, record: bytes, limit: int) -> int:
        frame = _LENGTH.pack(len(record)) + record
        end = at + len(frame)
        if end >= limit:  # the end of a log lies in its half
            raise LedgerFull
        self._map[at:end] = frame
        return end


class Rewriting:
    """A log in the other half; it takes effect with `commit`."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._half = _half(ledger._limit % SIZE)
        self._end = self._half.start

    def append(self, record: bytes) -> None:
        """Raises `LedgerFull`."""
        self._end = self._ledger._write(self._end, record, self._half.stop)

    def commit(self) -> None:
        """Make this the log. It must mean the same as all of the old one."""
        ledger = self._ledger
        ledger._limit = self._half.stop
        ledger._end_word[0] = ledger._end = self._end


def _half(at: int) -> range:
    """The half that `at` lies in."""
    start = _LOG if at < _LOG + HALF else _LOG + HALF
    return range(start, start + HALF)
