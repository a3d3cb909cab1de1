"""Which VMA of another process covers an address, asked of its /proc/PID/maps.

Owns the two ways to ask: PROCMAP_QUERY (Linux 6.11), and reading the file where the kernel lacks it. The
descriptor stays bound to the mm that it was opened on. Must not know trio: both ways wait for the mmap lock
of the process asked about, so they belong in a worker thread.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import struct
from bisect import bisect_right
from collections.abc import Callable

import msgspec

from intercept_protocol.addresses import PAGE_SHIFT
from intercept_protocol.outcomes import Access

PROCMAP_QUERY = 0xC0686611
"""_IOWR('f', 17, struct procmap_query), include/uapi/linux/fs.h."""
_QUESTION = struct.Struct("<3Q80x")
"""struct procmap_query, 104 bytes: its size, query_flags, query_addr; no name, no build id."""
_REPLY = struct.Struct("<24x3Q8x2Q2I24x")
"""The same: vma_start, vma_end, vma_flags, vma_offset, inode, dev_major, dev_minor."""
_ACCESS = tuple(Access(bits) for bits in range(8))
"""By PROCMAP_QUERY_VMA_READABLE, _WRITABLE, _EXECUTABLE: the same three bits. Flags put together one by one
take 0.5 us."""
_LINE = re.compile(
    rb"(?P<start>[0-9a-f]+)-(?P<end>[0-9a-f]+) (?P<rights>[r-][w-][x-][ps]) (?P<offset>[0-9a-f]+) "
    rb"(?P<major>[0-9a-f]+):(?P<minor>[0-9a-f]+) (?P<inode>\d+)"
)
"""A line of the maps file, proc_pid_maps(5)."""
_READ_BYTES = 1 << 16
KERNEL_HALF = 1 << (63 - PAGE_SHIFT)
"""On every 64-bit Linux the addresses from 2^63 up are not user space's."""


class MmGone(Exception):
    """The process has exited or called exec: the mm behind the descriptor is no more."""


class LiveVma(msgspec.Struct, frozen=True, gc=False):
    """Pages [start, end) of the process; `offset_page` is the page of the file behind the first."""

    start: int
    end: int
    access: Access
    offset_page: int
    device: tuple[int, int]
    inode: int

    @property
    def backing(self) -> str:
        """What the frames belong to: a file or memfd by device and inode, or the mm itself."""
        return f"file {self.device[0]}:{self.device[1]}:{self.inode}" if self.inode else "anonymous"

    @property
    def identity(self) -> tuple[object, ...]:
        """What stays the same when the VMA is split or merged: the line that its file pages lie on. Anonymous
        VMAs have no such line, and special ones look like them."""
        if self.inode:
            return self.backing, self.offset_page - self.start
        return self.backing, self.start, self.end

    def continues(self, other: LiveVma) -> bool:
        """Whether a page in both has the same frame and rights here as there."""
        return (
            self.backing == other.backing
            and self.access == other.access
            and (not self.inode or self.offset_page - self.start == other.offset_page - other.start)
        )

    def backing_page(self, page: int) -> int:
        """The frame's page within its backing."""
        return page - self.start + self.offset_page if self.inode else page


class ProcMaps:
    """An open maps file of some process. Owns the descriptor."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._has_query = True

    def close(self) -> None:
        os.close(self._descriptor)

    def vma_at(self, page: int) -> LiveVma | None:
        """The VMA that covers a page, or None. Blocks for the process's mmap lock; raises `MmGone`.

        The kernel's half has none: the maps file lists [vsyscall] there, which is no VMA of the process.
        """
        if page >= KERNEL_HALF:
            return None
        if self._has_query:
            try:
                return self._query(page)
            except OSError as error:
                if error.errno != errno.ENOTTY:
                    raise
                self._has_query = False
        return self._scan(page)

    def view(self) -> Callable[[int], LiveVma | None]:
        """`vma_at`, for many pages one after the other. Where the file must be read, it is read once, now."""
        if self._has_query:
            return self.vma_at
        vmas = [_parsed(match) for match in _LINE.finditer(self._read())]

        def vma_at(page: int) -> LiveVma | None:
            place = bisect_right(vmas, page, key=lambda vma: vma.start)
            vma = vmas[place - 1] if place else None
            return vma if vma is not None and page < vma.end else None

        return vma_at

    def _query(self, page: int) -> LiveVma | None:
        request = bytearray(_QUESTION.pack(_QUESTION.size, 0, page << PAGE_SHIFT))
        try:
            fcntl.ioctl(self._descriptor, PROCMAP_QUERY, request)
        except OSError as error:
            if error.errno == errno.ENOENT:
                return None
            if error.errno == errno.ESRCH:
                raise MmGone from error
            raise
        start, end, flags, offset, inode, major, minor = _REPLY.unpack(request)
        return LiveVma(
            start >> PAGE_SHIFT,
            end >> PAGE_SHIFT,
            _ACCESS[flags & 7],
            offset >> PAGE_SHIFT,
            (major, minor),
            inode,
        )

    def _scan(self, page: int) -> LiveVma | None:
        for match in _LINE.finditer(self._read()):
            if int(match["start"], 16) >> PAGE_SHIFT <= page < int(match["end"], 16) >> PAGE_SHIFT:
                return _parsed(match)
        return None

    def _read(self) -> bytes:
        text = read_all(self._descriptor)
        if not text:
            raise MmGone
        return text


def read_all(descriptor: int) -> bytes:
    """A /proc file from its beginning, whatever its shared file position is. Raises `MmGone` once the process
    was reaped; before, and after an exec, the file is empty."""
    chunks = []
    position = 0
    try:
        while chunk := os.pread(descriptor, _READ_BYTES, position):
            chunks.append(chunk)
            position += len(chunk)
    except ProcessLookupError as error:
        raise MmGone from error
    return b"".join(chunks)


def _parsed(match: re.Match[bytes]) -> LiveVma:
    rights = match["rights"]
    access = (
        (Access.READ if rights[0:1] == b"r" else Access.NONE)
        | (Access.WRITE if rights[1:2] == b"w" else Access.NONE)
        | (Access.EXECUTE if rights[2:3] == b"x" else Access.NONE)
    )
    return LiveVma(
        int(match["start"], 16) >> PAGE_SHIFT,
        int(match["end"], 16) >> PAGE_SHIFT,
        access,
        int(match["offset"], 16) >> PAGE_SHIFT,
        (int(match["major"], 16), int(match["minor"], 16)),
        int(match["inode"]),
    )
