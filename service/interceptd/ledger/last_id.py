"""The last partition id that was given out, in memory that outlives the daemon: ids are never used again."""

from __future__ import annotations

import mmap
import os

SIZE = mmap.PAGESIZE


class LastId:
    """A memfd with one number. `descriptor` is a predecessor's, None for a new one. Raises `OSError`."""

    def __init__(self, descriptor: int | None = None) -> None:
        if descriptor is None:
            descriptor = os.memfd_create("interceptd-last-id", os.MFD_CLOEXEC)
        os.ftruncate(descriptor, SIZE)
        self.descriptor = descriptor
        self._map = mmap.mmap(descriptor, SIZE)
        self._word = memoryview(self._map)[:8].cast("Q")

    @property
    def value(self) -> int:
        return self._word[0]

    @value.setter
    def value(self, partition_id: int) -> None:
        self._word[0] = partition_id
