"""What a daemon leaves to its successor beside the ledgers: its last partition id, because ids are never used
again, and whether it rested."""

from __future__ import annotations

import mmap
import os

SIZE = mmap.PAGESIZE


class LastId:
    """A memfd with two numbers. `descriptor` is a predecessor's; None creates one. Raises `OSError`."""

    def __init__(self, descriptor: int | None = None) -> None:
        if descriptor is None:
            descriptor = os.memfd_create("interceptd-last-id", os.MFD_CLOEXEC)
        os.ftruncate(descriptor, SIZE)
        self.descriptor = descriptor
        self._map = mmap.mmap(descriptor, SIZE)
        self._words = memoryview(self._map)[:16].cast("Q")

    @property
    def value(self) -> int:
        return self._words[0]

    @value.setter
    def value(self, partition_id: int) -> None:
        self._words[0] = partition_id

    def rest(self) -> None:
        """Note that the daemon ends of its own accord: no request has killed it."""
        self._words[1] = 1

    def take_rest(self) -> bool:
        """Whether the predecessor rested. Clears the mark."""
        rested, self._words[1] = self._words[1], 0
        return bool(rested)
