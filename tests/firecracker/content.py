"""What a guest's memory must hold: the image, and what was done to it since.

Owns a private copy of the image, on which tests repeat what the guest did. Must not know where the guest's
pages come from.
"""

from __future__ import annotations

import mmap
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Final, Self

PAGE: Final = 4096
GAP: Final = 0xD000_0000
"""Guest-physical memory ends here at first (3,328 MiB), and goes on at 4 GiB; the image has no such gap."""
GAP_END: Final = 1 << 32
MASK: Final = (1 << 64) - 1
KEY: Final = 0x5EED_0000_0000_0000


class Content:
    """By guest-physical addresses, in bytes. All ranges lie on one side of the gap."""

    def __init__(self, image: Path) -> None:
        with image.open("rb") as file:
            self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        self._words = memoryview(self._bytes).cast("Q")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._words.release()
        self._bytes.close()

    def read(self, address: int) -> int:
        return self._words[_offset(address) // 8]

    def write(self, address: int, word: int) -> None:
        self._words[_offset(address) // 8] = word

    def bytes_from(self, address: int) -> bytes:
        """To the end of memory."""
        return self._bytes[_offset(address) :]

    def remove(self, page: int, count: int) -> None:
        """What was given to the balloon is zero when it is touched again."""
        begin = _offset(page * PAGE)
        self._bytes[begin : begin + count * PAGE] = bytes(count * PAGE)

    def hash(self, address: int, count: int, stride: int) -> int:
        """As the guest computes it."""
        found = 0xCBF29CE484222325
        for word in islice(self._words[_offset(address) // 8 :: stride // 8], count):
            found = (found ^ word) * 0x100000001B3 & MASK
        return found


def _offset(address: int) -> int:
    """In the image."""
    assert address < GAP or address >= GAP_END, f"{address:#x} is no RAM"
    return address if address < GAP else address - GAP_END + GAP
