"""The reader's side of a trace: a ring of records that the daemon writes and this process reads.

Owns the memory and the rule that says which records were overwritten; `intercept_protocol.trace` has the
layout. Must not know how the daemon was asked to write it, nor what the records mean.
"""

from __future__ import annotations

import fcntl
import mmap
import os
from typing import Final, NamedTuple

from intercept_protocol.trace import COUNT_PLACE, RECORD_SIZE, RECORDS_AT_LEAST, RECORDS_LIMIT, RING_HEADER

RECORDS_A_READ: Final = 8192
"""Half a megabyte."""


class RecordsRead(NamedTuple):
    """Records in a row; `lost` ones before the first were overwritten before they were read."""

    lost: int
    first_number: int
    stored: bytes


class TraceRing:
    """`records` is a power of two; each takes 64 bytes, which are allocated at once. Raises `OSError`.

    A daemon writes it for one connection only. Close it after that.
    """

    def __init__(self, records: int) -> None:
        if not RECORDS_AT_LEAST <= records <= RECORDS_LIMIT or records & (records - 1):
            raise ValueError(
                f"a ring has a power of two of records, {RECORDS_AT_LEAST} to {RECORDS_LIMIT}, not {records}"
            )
        size = RING_HEADER + records * RECORD_SIZE
        self.descriptor = os.memfd_create("interceptd-trace", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.posix_fallocate(self.descriptor, 0, size)
            fcntl.fcntl(self.descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
            self._map = mmap.mmap(self.descriptor, size, prot=mmap.PROT_READ)
        except BaseException:
            os.close(self.descriptor)
            raise
        self._records = records
        self._view = memoryview(self._map)
        self._count = self._view[COUNT_PLACE : COUNT_PLACE + 8].cast("Q")
        self._next = 0

    @property
    def written(self) -> int:
        """How many records the daemon has ever written."""
        return self._count[0]

    def read(self) -> RecordsRead:
        """The next records, up to `RECORDS_A_READ`; none if there are no new ones. Never blocks."""
        lost = 0
        while True:
            written = self.written
            first = max(self._next, written - self._records)
            lost += first - self._next
            count = min(written - first, RECORDS_A_READ)
            stored = self._copy(first, count)
            # The daemon may be writing record `written` now, over the one in its slot.
            overwritten = min(max(self.written + 1 - self._records - first, 0), count)
            lost += overwritten
            self._next = first + count
            if overwritten < count or not count:
                return RecordsRead(lost, first + overwritten, stored[overwritten * RECORD_SIZE :])

    def close(self) -> None:
        """Give the memory back."""
        self._count.release()
        self._view.release()
        self._map.close()
        os.close(self.descriptor)

    def _copy(self, first: int, count: int) -> bytes:
        """Records from number `first` on, around the end of the ring."""
        slot = first % self._records
        head = min(count, self._records - slot)
        return self._slots(slot, head) + self._slots(0, count - head)

    def _slots(self, slot: int, count: int) -> bytes:
        start = RING_HEADER + slot * RECORD_SIZE
        return bytes(self._view[start : start + count * RECORD_SIZE])
