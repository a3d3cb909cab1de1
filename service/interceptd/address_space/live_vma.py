"""A VMA of another process, as its maps file shows it, and the frames behind it.

Owns the identity of frames. Must not know how the kernel is queried.
"""

from __future__ import annotations

from itertools import product
from typing import Final

import msgspec

from intercept_protocol.addresses import UaddrRange
from intercept_protocol.outcomes import Access

ACCESSES: Final = tuple(Access(bits) for bits in range(8))
"""By their bits: combining flags one by one is slow."""
RIGHTS: Final = {
    bytes(letters): ACCESSES[sum(1 << bit for bit, letter in enumerate(letters) if letter != ord("-"))]
    for letters in product(b"r-", b"w-", b"x-")
}
"""By the letters of the maps file."""
ANONYMOUS: Final = "anonymous"
"""The backing of memory private to the mm; `page` is then the page number in the process."""
_OF_FILES: Final = (b"/", b"[anon_shmem:")
"""Prefixes of the names of files, and of shared anonymous memory, which is a file too."""
_SYSV: Final = b"/SYSV"
"""Prefix of the name of a System V segment, newseg() in ipc/shm.c."""
Identity = tuple[tuple[int, int], int, int, bytes]


class LiveVma(msgspec.Struct, frozen=True, gc=False):
    """Pages [start, end) of the process. `offset_page` is the file's page behind the first one, `name` what
    the kernel shows: a path, `anon_inode:...`, `[heap]`, or nothing. `unit` is how many pages the kernel
    keeps together: those of a huge page, or of the whole VMA if unknown."""

    start: int
    end: int
    access: Access
    offset_page: int
    device: tuple[int, int]
    inode: int
    shared: bool
    name: bytes
    unit: int = 1

    @property
    def backing(self) -> str:
        """The object that the frames belong to.

        A shared mapping of a file has the frames of the file. A private one gets its own once it is written
        to. All anon_inode files share one inode, and other files without a path are no better: what their
        driver maps belongs to the mapping. A System V segment shows its id as its inode: 0 for the first one
        after boot, and possibly that of a memfd on the same device.
        """
        if not self._is_of_file:
            return ANONYMOUS
        kind = "sysv" if self._is_sysv else "file"
        return f"{kind} {self.device[0]}:{self.device[1]}:{self.inode}"

    @property
    def _is_of_file(self) -> bool:
        return self.shared and (self._is_sysv or (self.inode != 0 and self.name.startswith(_OF_FILES)))

    @property
    def _is_sysv(self) -> bool:
        return self.name.startswith(_SYSV)

    @property
    def identity(self) -> Identity:
        """Distinguishes it from most VMAs that may replace it, and survives a split or a merge. Not unique:
        two mappings of anon_inode files may have the same identity."""
        line = self.offset_page - self.start if self.inode else 0
        name = b"" if self.inode and self.name.startswith(_OF_FILES) else self.name
        return self.device, self.inode, line, name

    def continues(self, other: LiveVma) -> bool:
        """Whether a page in both has the same frame and rights in both."""
        return (
            self.backing == other.backing
            and self.access == other.access
            and self.backing_page(self.start) == other.backing_page(self.start)
        )

    def covers(self, uaddrs: UaddrRange) -> bool:
        return self.start <= uaddrs.start and uaddrs.end <= self.end

    def whole_units(self, uaddrs: UaddrRange) -> UaddrRange:
        """`uaddrs`, a part of the VMA, widened to whole units."""
        if self.unit == 1:
            return uaddrs
        start, end = uaddrs.start - self.start, uaddrs.end - self.start
        widened = UaddrRange(
            start=self.start + start - start % self.unit, end=self.start + end + -end % self.unit
        )
        return UaddrRange(start=widened.start, end=min(widened.end, self.end))

    def backing_page(self, page: int) -> int:
        """The frame's page within its backing, extrapolated for a page outside the VMA."""
        return page - self.start + self.offset_page if self._is_of_file else page
