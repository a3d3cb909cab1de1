"""The text of an open /proc/PID/maps or smaps, in pieces of whole records.

Owns the descriptor, and whose turn it is to read it. Must not know the contents of a record beyond its
addresses, nor trio: a read waits for the mmap lock of the process, so it belongs in a worker thread.

The kernel renders the text during the read. A read that starts where the last one on the same open file ended
continues with the next VMA, found by its address, and returns whole records (seq_read_iter() in
fs/seq_file.c, m_start() in fs/proc/task_mmu.c). Any other read renders the text from the beginning up to its
offset, where there may be other VMAs by now: records are skipped or torn. Hence one reader at a time, piece
after piece. The VMM shares the open file and may read it too; we detect the records that this tears.
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
from interceptd.address_space.workers import pause_if_due

PIECE_BYTES = 1 << 16
"""More than the kernel's buffer (a page, or a longer record), so that a piece ends with a record."""
TURN_SECONDS = 5.0
"""How long a question waits for its turn, and about how long its turn lasts. Its caller may have left by
then: the thread must not wait forever behind a question that the kernel does not answer, nor read forever
because the VMM reads too and so makes the kernel render the text from the beginning each time."""
_ADDRESSES = re.compile(rb"(?P<start>[0-9a-f]{8,16})-(?P<end>[0-9a-f]{8,16}) ")
"""The first two fields of a record: show_vma_header_prefix(), fs/proc/task_mmu.c."""


class MmGone(Exception):
    """The process has exited or called exec: the mm behind the descriptor is gone."""


class Torn(Exception):
    """The piece does not start with a record: another process reads this open file too."""


class ProcText:
    """Owns the descriptor. Call `rewind` and `read` only within `turn`."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._turn = threading.Lock()
        self._position = 0
        self._until = math.inf

    def close(self) -> None:
        os.close(self.detach())

    def detach(self) -> int:
        """Give up the descriptor, which is the caller's to close."""
        descriptor, self._descriptor = self._descriptor, -1
        return descriptor

    def fileno(self) -> int:
        return self._descriptor

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Be the only reader. Raises `Undecided` when another one takes too long."""
        if not self._turn.acquire(timeout=TURN_SECONDS):
            raise Undecided("an earlier question to the process is still unanswered")
        self._until = time.monotonic() + TURN_SECONDS
        try:
            yield
        finally:
            self._turn.release()

    def rewind(self) -> None:
        """Continue with the first record."""
        self._position = 0

    def read(self) -> bytes:
        """The next whole records; empty at the end. Gives way first, then blocks for the process's mmap lock.

        Raises `MmGone`; `Torn`, after which the caller must `rewind`; and `Undecided` at the end of the turn,
        after which the next turn continues.
        """
        if time.monotonic() > self._until:
            raise Undecided("the process takes too long to show its VMAs")
        pause_if_due()
        piece = self._pread(PIECE_BYTES, self._position)
        if not piece:
            self._require_mm()
        elif self._position and not self._begins_a_record(piece):
            raise Torn
        self._position += len(piece)
        return piece

    def _begins_a_record(self, piece: bytes) -> bool:
        """A start address that lost digits is shorter than the end address. If it is shorter because the VMA
        crosses 2^32, 2^36, ..., a line end precedes it."""
        addresses = _ADDRESSES.match(piece)
        if addresses is None:
            return False
        if len(addresses["start"]) == len(addresses["end"]):
            return True
        again = b"\n" + addresses[0]
        return self._pread(len(again), self._position - 1) == again

    def _require_mm(self) -> None:
        """Raises `MmGone`: without an mm the text is empty, and if the mm goes meanwhile it just ends."""
        if not self._pread(1, 0):
            raise MmGone

    def _pread(self, size: int, position: int) -> bytes:
        try:
            return os.pread(self._descriptor, size, position)
        except OSError as error:
            if (
                cause_of(Call.READ_PROC, error) is Cause.MM_GONE
            ):  # the process was reaped; until then its text is empty
                raise MmGone from error
            raise
