"""A VMA of another process, as its maps file shows it, and the frames that stand behind it.

Owns what makes two frames the same. Must not know how the kernel is asked.
"""

from __future__ import annotations

from itertools import product
from typing import Final

import msgspec

from intercept_protocol.addresses import UaddrRange
from intercept_protocol.outcomes import Access

ACCESSES: Final = tuple(Access(bits) for bits in range(8))
"""By their bits. Flags put together one by one take 0.5 us."""
RIGHTS: Final = {
    bytes(letters): ACCESSES[sum(1 << bit for bit, letter in enumerate(letters) if letter != ord("-"))]
    for letters in product(b"r-", b"w-", b"x-")
}
"""By the letters of the maps file."""
ANONYMOUS: Final = "anonymous"
"""The backing of memory that belongs to the mm alone: `page` is then the page of the process."""
_OF_FILES: Final = (b"/", b"[anon_shmem:")
"""How the names of files begin, and of shared anonymous memory, which is a file too."""
_SYSV: Final = b"/SYSV"
"""How the name of a System V segment begins, newseg() in ipc/shm.c."""
Identity = tuple[tuple[int, int], int, int, bytes]


class LiveVma(msgspec.Struct, frozen=True, gc=False):
    """Pages [start, end) of the process; `offset_page` is the page of the file behind the first, `name` what
    the kernel shows for it: a path, `anon_inode:...`, `[heap]`, or nothing. `unit` is how many pages the
    kernel keeps together: those of a huge page, or all where it is not known."""

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
        """What the frames belong to.

        A shared mapping of a file has the file's. A private one has pages of its own as soon as it is
        written to. All anon_inode files have one inode, and other files without a path are no better: what
        their driver maps belongs to that mapping. A System V segment shows its id for an inode, which a memfd
        on the same device may have, too.
        """
        if not self._is_of_file:
            return ANONYMOUS
        kind = "sysv" if self.name.startswith(_SYSV) else "file"
        return f"{kind} {self.device[0]}:{self.device[1]}:{self.inode}"

    @property
    def _is_of_file(self) -> bool:
        return self.shared and self.inode != 0 and self.name.startswith(_OF_FILES)

    @property
    def identity(self) -> Identity:
        """What tells it from most VMAs that may take its place, and what a split or a merge does not change.
        Nothing to remember anything by for good: two mappings of anon_inode files may not differ in it."""
        line = self.offset_page - self.start if self.inode else 0
        name = b"" if self.inode and self.name.startswith(_OF_FILES) else self.name
        return self.device, self.inode, line, name

    def continues(self, other: LiveVma) -> bool:
        """Whether a page in both has the same frame and rights here as there."""
        return (
            self.backing == other.backing
            and self.access == other.access
            and self.backing_page(self.start) == other.backing_page(self.start)
        )

    def covers(self, uaddrs: UaddrRange) -> bool:
        return self.start <= uaddrs.start and uaddrs.end <= self.end

    def whole_units(self, uaddrs: UaddrRange) -> UaddrRange:
        """The units that `uaddrs`, a part of the VMA, lies in."""
        if self.unit == 1:
            return uaddrs
        start, end = uaddrs.start - self.start, uaddrs.end - self.start
        widened = UaddrRange(
            start=self.start + start - start % self.unit, end=self.start + end + -end % self.unit
        )
        return UaddrRange(start=widened.start, end=min(widened.end, self.end))

    def backing_page(self, page: int) -> int:
        """The frame's page within its backing; also for a page outside, by the line that the VMA lies on."""
        return page - self.start + self.offset_page if self._is_of_file else page
