"""A userfaultfd that reports missing pages, and the ioctls that bring them in (Linux: ioctl_userfaultfd(2)).

Owns the format of its messages and the numbers of the ioctls. Must not know images, gfns or partitions.
Reading never blocks. The ioctls wait for the VMA's lock, which the process holds while it changes its memory.

Messages are read one at a time, so that where the process is kept for a successor each lies in the ledger
before it is acted on.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from typing import Final

import trio

from intercept_protocol.addresses import PAGE_SHIFT, UaddrRange
from interceptd.address_space.userfaultfd import UFFDIO_UNREGISTER

UFFDIO_WAKE = 0x8010AA02
UFFDIO_COPY = 0xC028AA03
UFFDIO_ZEROPAGE = 0xC020AA04
EVENT_PAGEFAULT = 0x12
EVENT_REMOVE = 0x15
MESSAGE_BYTES: Final = 32
_MESSAGE = struct.Struct("<B7xQQQ")
"""struct uffd_msg: the event; of a page fault its flags and address, of a REMOVE its start and end."""
_RANGE = struct.Struct("<2Q")
"""struct uffdio_range: start, len."""
_COPY = struct.Struct("<4Qq")
"""struct uffdio_copy: dst, src, len, mode, copy."""
_ZEROPAGE = struct.Struct("<3Qq")
"""struct uffdio_zeropage: start, len, mode, zeropage."""


class Partly(Exception):
    """An ioctl was not done in full. `number` is its errno, and `done` counts the bytes from the start that
    are in: if there are any, `number` tells nothing, and the ioctl is repeated behind them."""

    def __init__(self, number: int, done: int) -> None:
        super().__init__(errno.errorcode.get(number, str(number)))
        self.number = number
        self.done = done


class MissingFaults:
    """Borrows the descriptor, whose owner closes it. `gone` is set once the kernel says that the process has
    no memory any more (ESRCH)."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._message: bytearray | memoryview = bytearray(MESSAGE_BYTES)
        self._into: list[bytearray | memoryview] = [self._message]
        self._copy = bytearray(_COPY.size)
        self._zeropage = bytearray(_ZEROPAGE.size)
        self.gone = trio.Event()

    def fileno(self) -> int:
        return self._descriptor

    def read_into(self, buffer: memoryview) -> None:
        """From now on read messages to `buffer`, of `MESSAGE_BYTES`, where a successor finds one that was
        read and not forgotten."""
        self._message, self._into = buffer, [buffer]

    def read(self) -> int | UaddrRange | None:
        """The page that a thread waits for, the range that is being removed, or None if there is no message.
        After a removal call `forget_message` once it is recorded."""
        while True:
            try:
                os.preadv(self._descriptor, self._into, -1, os.RWF_NOWAIT)
            except BlockingIOError:
                return None
            event, first, second, _ = _MESSAGE.unpack_from(self._message)
            if event == EVENT_PAGEFAULT:
                return int(second >> PAGE_SHIFT)
            if event == EVENT_REMOVE:
                return UaddrRange(start=first >> PAGE_SHIFT, end=second >> PAGE_SHIFT)

    def forget_message(self) -> None:
        """What was read last is recorded."""
        self._message[:] = bytes(MESSAGE_BYTES)

    def copy(self, page: int, source: int, count: int) -> None:
        """Bring in `count` pages at `page`, with the bytes at the address `source`, and wake who waits for
        them. Raises `Partly`, `OSError`."""
        request = self._copy
        length = count << PAGE_SHIFT
        _COPY.pack_into(request, 0, page << PAGE_SHIFT, source, length, 0, 0)
        try:
            fcntl.ioctl(self._descriptor, UFFDIO_COPY, request)
        except OSError as error:
            self._raise(error, _COPY.unpack(request)[4])

    def zero(self, page: int, count: int) -> None:
        """The same with pages of zeroes; not of huge pages (EINVAL)."""
        request = self._zeropage
        _ZEROPAGE.pack_into(request, 0, page << PAGE_SHIFT, count << PAGE_SHIFT, 0, 0)
        try:
            fcntl.ioctl(self._descriptor, UFFDIO_ZEROPAGE, request)
        except OSError as error:
            self._raise(error, _ZEROPAGE.unpack(request)[3])

    def wake(self, uaddrs: UaddrRange) -> None:
        """Let all threads go on that wait for these pages: who still misses one waits again."""
        fcntl.ioctl(self._descriptor, UFFDIO_WAKE, _RANGE.pack(uaddrs.start_uaddr, uaddrs.length))

    def unregister(self, uaddrs: UaddrRange) -> None:
        """From now on the kernel itself fills what is missing there, with zeroes. Blocks for the process's
        mmap lock: belongs in a worker thread. Raises `OSError`."""
        fcntl.ioctl(self._descriptor, UFFDIO_UNREGISTER, _RANGE.pack(uaddrs.start_uaddr, uaddrs.length))

    def _raise(self, error: OSError, done: int) -> None:
        if error.errno == errno.ESRCH:
            self.gone.set()
        raise Partly(error.errno or 0, max(done, 0)) from None
