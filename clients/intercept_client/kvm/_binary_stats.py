"""KVM's own counters, read from its binary statistics descriptor.

Owns the file's layout (Documentation/virt/kvm/api.rst, 4.133 KVM_GET_STATS_FD); must not know the counters.
They prove that later accesses do not exit, which this library's own counters cannot.
"""

from __future__ import annotations

import os
from struct import Struct
from typing import Final

_HEADER: Final = Struct("<6I")
"""flags, name_size, num_desc, id_offset, desc_offset, data_offset."""
_DESCRIPTOR: Final = Struct("<IhHII")
"""flags, exponent, size (values), offset from data_offset, bucket_size; the name follows."""
_VALUE: Final = Struct("<Q")


class BinaryStats:
    """The statistics of one VM or vCPU; owns the descriptor."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        try:
            self._offsets = self._read_layout()
        except BaseException:
            os.close(descriptor)
            raise

    def close(self) -> None:
        """Idempotent."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    @property
    def names(self) -> frozenset[str]:
        return frozenset(self._offsets)

    def read(self, name: str) -> int:
        """The counter now; for a histogram its first bucket. KeyError for one that this kernel lacks."""
        (value,) = _VALUE.unpack(os.pread(self._descriptor, _VALUE.size, self._offsets[name]))
        return int(value)

    def _read_layout(self) -> dict[str, int]:
        _, name_size, count, _, descriptors_at, data_at = _HEADER.unpack(
            os.pread(self._descriptor, _HEADER.size, 0)
        )
        size = _DESCRIPTOR.size + name_size
        table = os.pread(self._descriptor, count * size, descriptors_at)
        offsets = {}
        for start in range(0, len(table), size):
            _, _, _, offset, _ = _DESCRIPTOR.unpack_from(table, start)
            name = table[start + _DESCRIPTOR.size : start + size].split(b"\0", 1)[0].decode()
            offsets[name] = data_at + offset
        return offsets
