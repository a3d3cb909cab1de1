"""The file that holds the memory of a snapshot.

Owns its descriptor, and how its bytes are read without waiting for a disk or a file server. Must not know
whose memory they become.

What a read of the page cache cannot bring at once, a worker reads, which may take as long as the file's
server likes. Not every file system can tell the two apart (RWF_NOWAIT): those of memory alone never wait, and
of the others what a worker has read is kept for a while.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import stat
from collections import deque
from typing import Final, NamedTuple

from intercept_protocol.addresses import PAGE_SHIFT, PAGE_SIZE
from interceptd.connections.closer import Closer

MOST_PAGES: Final = 512
"""Pages that can be read at once."""
KEPT_BYTES: Final = 4 << 20
"""What a worker has read of a file that does not know RWF_NOWAIT, at most so much of it and the last one."""
_IN_MEMORY: Final = frozenset({0x01021994, 0x958458F6})
"""TMPFS_MAGIC (memfds, too) and HUGETLBFS_MAGIC: their files have neither a disk nor a server."""


class _Statfs(ctypes.Structure):
    _fields_ = (("type", ctypes.c_long), ("rest", ctypes.c_byte * 248))


_fstatfs = ctypes.CDLL(None, use_errno=True).fstatfs
_fstatfs.argtypes = (ctypes.c_int, ctypes.POINTER(_Statfs))


class _Buffer:
    """Page-aligned memory that is there, and what it holds."""

    def __init__(self, pages: int) -> None:
        memory = mmap.mmap(-1, pages << PAGE_SHIFT)
        self.view = memoryview(memory)
        self.address = ctypes.addressof(ctypes.c_byte.from_buffer(memory))
        self.image: Image | None = None
        self.start = self.end = 0
        """The pages of the image that it holds."""


_PASSED = mmap.mmap(-1, MOST_PAGES << PAGE_SHIFT)
"""Where bytes go that only have to pass through the page cache: nobody looks at them, so threads share it."""


class Run(NamedTuple):
    """Pages that a worker has read; without bytes if the page cache has them."""

    start: int
    end: int
    data: memoryview


class Image:
    """Owns the descriptor, which `closer` closes. The constructor asks the file system and belongs in a
    worker; it raises `OSError`, and the caller then keeps the descriptor."""

    _shared: _Buffer | None = None
    """Of all images: what is read is used in the same step."""

    def __init__(self, descriptor: int, closer: Closer) -> None:
        self.pages = os.lseek(descriptor, 0, os.SEEK_END) >> PAGE_SHIFT
        """Whole pages of 4 KiB."""
        self._descriptor = descriptor
        self._closer = closer
        self._flags = 0 if _is_in_memory(descriptor) else os.RWF_NOWAIT
        self._kept: deque[Run] | None = None if self._flags == 0 or _knows_nowait(descriptor) else deque()

    @property
    def kept_limit(self) -> int:
        """Bytes that `keep` may keep: of a file whose page cache cannot be asked."""
        return 0 if self._kept is None else KEPT_BYTES + (MOST_PAGES << PAGE_SHIFT)

    def resident(self, page: int, count: int) -> int:
        """How many of the pages from `page` on can be had at once, which are then at hand for `read_nowait`.
        At most `MOST_PAGES`. Never blocks."""
        buffer = Image._shared
        if buffer is None:
            buffer = Image._shared = _Buffer(MOST_PAGES)
        if buffer.image is self and buffer.start <= page and page + count <= buffer.end:
            return count
        count = min(count, MOST_PAGES)
        buffer.image = None
        read = self._read(buffer, page, count)
        buffer.image, buffer.start, buffer.end = self, page, page + read
        return read

    def read_nowait(self, page: int, count: int) -> int | None:
        """The address of the bytes of so many pages, good until the next call of this module; None if not all
        can be had at once."""
        if self.resident(page, count) < count:
            return None
        buffer = Image._shared
        assert buffer is not None, "it has just been filled"
        return buffer.address + (page - buffer.start << PAGE_SHIFT)

    def read_apart(self, page: int, count: int) -> _Buffer | None:
        """The same in memory of its own, which lasts as long as what is returned."""
        buffer = _Buffer(count)
        return buffer if self._read(buffer, page, count) == count else None

    def read(self, page: int, count: int) -> Run:
        """In a worker: have the pages read into the page cache. Raises `OSError`, EIO where the file has
        become shorter."""
        wanted, done = count << PAGE_SHIFT, 0
        data = memoryview(bytearray(0 if self._kept is None else wanted))
        while done < wanted:
            into = data[done:] if data else memoryview(_PASSED)[: wanted - done]
            size = os.preadv(self._descriptor, [into], (page << PAGE_SHIFT) + done)
            if not size:
                raise OSError(errno.EIO, f"the image ends before page {page + count:#x}")
            done += size
        return Run(page, page + count, data)

    def keep(self, run: Run) -> None:
        """What a worker has read can be had at once from now on, for a while."""
        kept = self._kept
        if kept is not None:
            kept.append(run)
            while len(kept) > 1 and sum(len(run.data) for run in kept) > KEPT_BYTES:
                kept.popleft()

    def fileno(self) -> int:
        return self._descriptor

    def close(self) -> None:
        """Idempotent. A file server may hold up a close, so a thread makes it."""
        if self._descriptor >= 0:
            self._closer.close([self._descriptor])
            self._descriptor = -1

    def _read(self, buffer: _Buffer, page: int, count: int) -> int:
        """Read pages into the start of `buffer`, and return how many were there."""
        if self._kept is not None:
            return _from_kept(self._kept, buffer, page, count)
        try:
            size = os.preadv(
                self._descriptor, [buffer.view[: count << PAGE_SHIFT]], page << PAGE_SHIFT, self._flags
            )
        except OSError:  # EAGAIN: not now; another errno a worker will meet, too
            return 0
        return size >> PAGE_SHIFT


def _from_kept(kept: deque[Run], buffer: _Buffer, page: int, count: int) -> int:
    for run in reversed(kept):
        if run.start <= page < run.end:
            size = min(count, run.end - page) << PAGE_SHIFT
            offset = page - run.start << PAGE_SHIFT
            buffer.view[:size] = run.data[offset : offset + size]
            return size >> PAGE_SHIFT
    return 0


def _file_system(descriptor: int) -> int:
    """The magic number of the file system that a descriptor is on."""
    told = _Statfs()
    if _fstatfs(descriptor, ctypes.byref(told)):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return int(told.type)


def _is_in_memory(descriptor: int) -> bool:
    """Also a block device has its name on a tmpfs, mostly, and its pages elsewhere."""
    return stat.S_ISREG(os.fstat(descriptor).st_mode) and _file_system(descriptor) in _IN_MEMORY


def _knows_nowait(descriptor: int) -> bool:
    try:
        os.preadv(descriptor, [bytearray(PAGE_SIZE)], 0, os.RWF_NOWAIT)
    except OSError as error:
        return error.errno != errno.EOPNOTSUPP
    return True
