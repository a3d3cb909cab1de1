"""The text of an open /proc/PID/maps or smaps, in pieces of whole records.

Owns the descriptor, and the turn to read it. Must not know what a record says beyond its addresses, nor trio:
a read waits for the mmap lock of the process, so it belongs in a worker thread.

The kernel renders the text during the read. A read that begins where the last one on the same open file
ended continues with the next VMA, found by its address, and returns whole records (seq_read_iter() in
fs/seq_file.c, m_start() in fs/proc/task_mmu.c). Any other read renders the text from the beginning up to its
offset, where other VMAs may stand by now: records are skipped or cut in two. Hence one reader at a time, from
piece to piece. The VMM shares the open file and may read it too; a record that this cuts is recognised.
"""

from __future__ import annotations

import math
import os
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from interceptd.address_space import Undecided
from interceptd.address_space.refusals import Call, Cause, cause_of

PIECE_BYTES = 1 << 16
"""More than the kernel's buffer, a page or what one record takes: so a piece ends where a record does."""
TURN_SECONDS = 5.0
"""A question waits this long for its turn, and has it about as long. It may have been given up by then: its
thread must not wait for ever behind one that the kernel does not answer, nor read for ever because the VMM
reads, too, and has the text rendered from the beginning each time."""
_ADDRESSES = re.compile(rb"(?P<start>[0-9a-f]{8,16})-(?P<end>[0-9a-f]{8,16}) ")
"""The first two fields of a record: show_vma_header_prefix(), fs/proc/task_mmu.c."""


class MmGone(Exception):
    """The process has exited or called exec: the mm behind the descriptor is no more."""


class Torn(Exception):
    """The piece does not begin with a record: somebody else reads this open file."""


class ProcText:
    """Owns the descriptor. `rewind` and `read` are for whoever has the turn."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._turn = threading.Lock()
        self._position = 0
        self._until = math.inf

    def close(self) -> None:
        os.close(self._descriptor)

    def fileno(self) -> int:
        return self._descriptor

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Be the one reader. Raises `Undecided` when another one takes too long."""
        if not self._turn.acquire(timeout=TURN_SECONDS):
            raise Undecided("the process does not answer an earlier question")
        self._until = time.monotonic() + TURN_SECONDS
        try:
            yield
        finally:
            self._turn.release()

    def rewind(self) -> None:
        """Continue with the first record."""
        self._position = 0

    def read(self) -> bytes:
        """The next records, whole; empty at the end. Blocks for the process's mmap lock.

        Raises `MmGone`; `Torn`, after which only `rewind` helps; and `Undecided` at the end of the turn, of
        which the next one goes on.
        """
        if time.monotonic() > self._until:
            raise Undecided("the process takes too long to show its VMAs")
        piece = self._pread(PIECE_BYTES, self._position)
        if not piece:
            self._require_mm()
        elif self._position and not self._begins_a_record(piece):
            raise Torn
        self._position += len(piece)
        return piece

    def _begins_a_record(self, piece: bytes) -> bool:
        """A start address that lost digits is shorter than the end address. One that is shorter for another
        reason (a VMA across 2^32, 2^36, ...) has a line end before it."""
        addresses = _ADDRESSES.match(piece)
        if addresses is None:
            return False
        if len(addresses["start"]) == len(addresses["end"]):
            return True
        again = b"\n" + addresses[0]
        return self._pread(len(again), self._position - 1) == again

    def _require_mm(self) -> None:
        """The text of a process without an mm is empty, and one that lost it meanwhile just ends."""
        if not self._pread(1, 0):
            raise MmGone

    def _pread(self, size: int, position: int) -> bytes:
        try:
            return os.pread(self._descriptor, size, position)
        except OSError as error:
            if (
                cause_of(Call.READ_PROC, error) is Cause.MM_GONE
            ):  # it was reaped; until then its text is empty
                raise MmGone from error
            raise
