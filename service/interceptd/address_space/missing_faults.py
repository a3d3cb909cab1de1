"""A userfaultfd that reports missing pages, and the ioctls that bring them in (ioctl_userfaultfd(2)).

Owns the format of its messages and the numbers of its ioctls. Must not know images, gfns or partitions.
Reading and waking never block. The other ioctls wait for the lock of a VMA, which the process holds while it
changes its memory, and for memory.

Messages are read one at a time, so that where the process is kept for a successor each lies in the ledger
before it is acted on.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import struct
from collections.abc import Callable
from typing import Final

from intercept_protocol.addresses import PAGE_SHIFT, PAGE_SIZE, UaddrRange
from intercept_protocol.outcomes import Access
from interceptd.address_space import Undecided
from interceptd.address_space.userfaultfd import EVENT_UNMAP, UFFDIO_UNREGISTER, restore_nonblocking
from interceptd.address_space.workers import Workers

UFFDIO_WAKE = 0x8010AA02
UFFDIO_COPY = 0xC028AA03
UFFDIO_ZEROPAGE = 0xC020AA04
EVENT_PAGEFAULT = 0x12
EVENT_REMOVE = 0x15
FLAG_WRITE = 1
"""UFFD_PAGEFAULT_FLAG_WRITE."""
REMOVALS: Final = (EVENT_REMOVE, EVENT_UNMAP)
"""What was unmapped is gone like what was given back; a userfaultfd may report that, too."""
MESSAGE_BYTES: Final = 32
HUGE_UNIT: Final = 512
"""Pages of 4 KiB in a huge page."""
_ACCESSES = (Access.READ, Access.WRITE)
_MESSAGE = struct.Struct("<B7xQQQ")
"""struct uffd_msg: the event; of a page fault its flags and address, of a removal its start and end."""
_RANGE = struct.Struct("<2Q")
"""struct uffdio_range: start, len."""
_COPY = struct.Struct("<4Qq")
"""struct uffdio_copy: dst, src, len, mode, copy."""
_ZEROPAGE = struct.Struct("<3Qq")
"""struct uffdio_zeropage: start, len, mode, zeropage."""


class MissingFaults:
    """Borrows the descriptor, whose owner closes it. `workers` have one thread. `unit` is the number of 4 KiB
    pages that the kernel brings in at least, 512 for huge pages."""

    def __init__(self, descriptor: int, workers: Workers, *, unit: int = 1) -> None:
        self._descriptor = descriptor
        self._workers = workers
        self._message: bytearray | memoryview = bytearray(MESSAGE_BYTES)
        self._into: list[bytearray | memoryview] = [self._message]
        self._zeroes = 0 if unit == 1 else _zeroes(unit)
        """The address of a huge page's zeroes: the kernel's zero page is a small one."""
        self._unit = unit

        self.access = Access.READ
        """What the thread wanted that waits for the page read last."""

    def fileno(self) -> int:
        return self._descriptor

    def read_into(self, buffer: memoryview) -> None:
        """From now on read messages to `buffer`, of `MESSAGE_BYTES`, where a successor finds one that was
        read and not forgotten."""
        self._message, self._into = buffer, [buffer]

    def read(self) -> int | UaddrRange | None:
        """The page that a thread waits for, the range that is being removed, or None if there is no message.
        After a removal call `forget_message` once it is recorded. Raises `OSError`."""
        try:
            os.preadv(self._descriptor, self._into, -1, os.RWF_NOWAIT)
        except BlockingIOError:
            return None
        event, first, second, _ = _MESSAGE.unpack_from(self._message)
        if event in REMOVALS:
            return _removed(first, second)
        self.access = _ACCESSES[first & FLAG_WRITE]
        return int(second) >> PAGE_SHIFT

    def forget_message(self) -> None:
        """What was read last is recorded."""
        self._message[:] = bytes(MESSAGE_BYTES)

    def restore_nonblocking(self) -> bool:
        """See `Userfaultfd.restore_nonblocking`."""
        return restore_nonblocking(self._descriptor)

    def copy(self, page: int, source: int, count: int) -> int:
        """Bring in `count` pages at `page`, with the bytes at the address `source`, and wake who waits for
        them. Returns how many from the first on are in now, or the negative errno if none is."""
        request = bytearray(_COPY.pack(page << PAGE_SHIFT, source, count << PAGE_SHIFT, 0, 0))
        try:
            fcntl.ioctl(self._descriptor, UFFDIO_COPY, request)
        except OSError as error:
            return _brought(_COPY.unpack(request)[4], error)
        return count

    def zero(self, page: int, count: int) -> int:
        """The same with zeroes."""
        if self._zeroes:
            return self.copy(page, self._zeroes, self._unit)
        request = bytearray(_ZEROPAGE.pack(page << PAGE_SHIFT, count << PAGE_SHIFT, 0, 0))
        try:
            fcntl.ioctl(self._descriptor, UFFDIO_ZEROPAGE, request)
        except OSError as error:
            return _brought(_ZEROPAGE.unpack(request)[3], error)
        return count

    def wake(self, uaddrs: UaddrRange) -> None:
        """Let all threads go on that wait for these pages: who still misses one waits again."""
        fcntl.ioctl(self._descriptor, UFFDIO_WAKE, _RANGE.pack(uaddrs.start_uaddr, uaddrs.length))

    def unregister(self, uaddrs: UaddrRange) -> None:
        """From now on the kernel itself fills what is missing there, with zeroes. Blocks for the process's
        mmap lock: belongs in a worker. Raises `OSError`."""
        fcntl.ioctl(self._descriptor, UFFDIO_UNREGISTER, _RANGE.pack(uaddrs.start_uaddr, uaddrs.length))

    async def in_worker(self, call: Callable[[], None]) -> None:
        """Make ioctls in a thread. Raises what `call` does, and `OSError` if there is no thread now."""
        try:
            await self._workers.ask(call)
        except Undecided as error:
            raise OSError(error.number, str(error)) from error


def removal_in(message: bytes | memoryview) -> UaddrRange | None:
    """The range of a removal that a predecessor has read to `message` and not forgotten; None if there is
    none. A fault there need not be known: its thread is woken, and looks again."""
    event, start, end, _ = _MESSAGE.unpack(message)
    return _removed(start, end) if event in REMOVALS else None


def _removed(start: int, end: int) -> UaddrRange:
    return UaddrRange(start=start >> PAGE_SHIFT, end=end + PAGE_SIZE - 1 >> PAGE_SHIFT)


def _brought(bytes_done: int, error: OSError) -> int:
    return bytes_done >> PAGE_SHIFT if bytes_done > 0 else -(error.errno or errno.EIO)


_ZEROES: list[mmap.mmap] = []


def _zeroes(unit: int) -> int:
    """The address of zeroes that are never freed; they take no memory until they are read."""
    if not _ZEROES:
        _ZEROES.append(mmap.mmap(-1, unit << PAGE_SHIFT))
    return ctypes.addressof(ctypes.c_byte.from_buffer(_ZEROES[0]))
