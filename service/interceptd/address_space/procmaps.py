"""Finds the VMA of another process that covers an address, in its /proc/PID/maps.

Owns the two ways: PROCMAP_QUERY (Linux 6.11), and reading the file on kernels without it. The descriptor
stays bound to the mm on which it was opened. Must not know trio: both ways wait for the mmap lock of that
process, so they belong in a worker thread.
"""

from __future__ import annotations

import ctypes
import fcntl
import re
import struct
import threading
from bisect import bisect_right
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import suppress
from functools import partial
from itertools import islice
from typing import TypeVar

from msgspec.structs import replace

from intercept_protocol.addresses import PAGE_SHIFT, UaddrRange
from interceptd.address_space import Undecided
from interceptd.address_space.live_vma import ACCESSES, RIGHTS, LiveVma
from interceptd.address_space.proc_text import MmGone, ProcText, Torn
from interceptd.address_space.refusals import Call, Cause, cause_of

PROCMAP_QUERY = 0xC0686611
"""_IOWR('f', 17, struct procmap_query), include/uapi/linux/fs.h."""
_QUESTION = struct.Struct("<3Q56xI4xQ8x")
"""struct procmap_query, 104 bytes: its size, query_flags, query_addr, vma_name_size, vma_name_addr."""
_REPLY = struct.Struct("<24x6Q3I20x")
"""Its results: vma_start, vma_end, vma_flags, vma_page_size, vma_offset, inode, dev_major, dev_minor,
vma_name_size."""
_SHARED = 8
"""PROCMAP_QUERY_VMA_SHARED. The three bits below are the rights, in the order of `Access`."""
_PATH_MAX = 4096
_LONG_NAME = b"/"
"""Stands for a name over PATH_MAX bytes, which the kernel refuses to return. Only paths get so long."""
LINE = re.compile(
    rb"^(?P<start>[0-9a-f]{8,16})-(?P<end>[0-9a-f]{8,16}) (?P<rights>[r-][w-][x-])(?P<sharing>[ps]) "
    rb"(?P<offset>[0-9a-f]{8,16}) (?P<major>[0-9a-f]{2,8}):(?P<minor>[0-9a-f]{2,8}) (?P<inode>[0-9]{1,20}) *"
    rb"(?P<name>[^\n]*)$",
    re.MULTILINE,
)
"""A line of the maps file, and the first line of a record in smaps: proc_pid_maps(5). Anchored, because a
file name may look like such a line; the kernel writes a line end in it as \\012."""
_SCANS = 8
"""Times that one look-up reads the file because another reader tore a record."""
T = TypeVar("T")
KERNEL_HALF = 1 << (63 - PAGE_SHIFT)
"""On every 64-bit Linux, addresses from 2^63 up belong to the kernel."""


class ProcMaps:
    """An open maps file of some process. Owns the descriptor."""

    def __init__(self, descriptor: int) -> None:
        self._text = ProcText(descriptor)
        self._has_query = True

    def close(self) -> None:
        self._text.close()

    def fileno(self) -> int:
        return self._text.fileno()

    def detach(self) -> int:
        """Give up the descriptor, which is the caller's to close."""
        return self._text.detach()

    def vma_at(self, page: int) -> LiveVma | None:
        """The VMA that covers a page, or None. Blocks for the process's mmap lock. Raises `MmGone`, and
        `Undecided` if the file must be read and another reader keeps tearing it.

        None for the kernel's half, where the maps file lists [vsyscall], which is not a VMA of the process.
        """
        if page >= KERNEL_HALF:
            return None
        if self._has_query:
            try:
                return self._query(page)
            except OSError as error:
                if cause_of(Call.PROCMAP_QUERY, error) is not Cause.NOT_OFFERED:
                    raise
                self._has_query = False
        return self._scan(page)

    def view(self, wanted: Collection[UaddrRange], most: int) -> Callable[[int], LiveVma | None]:
        """`vma_at` for many pages in `wanted`: those of the first `most` VMAs in each range. If the file must
        be read, it is read once, now, as far as the last range."""
        if self._has_query:
            return self.vma_at
        vmas = self._untorn(lambda: _first_in_each(wanted, most, self._vmas()))

        def vma_at(page: int) -> LiveVma | None:
            place = bisect_right(vmas, page, key=lambda vma: vma.start)
            vma = vmas[place - 1] if place else None
            return vma if vma is not None and page < vma.end else None

        return vma_at

    def _query(self, page: int) -> LiveVma | None:
        try:
            return self._put(page, _NAMES.buffer)
        except OSError as error:
            if cause_of(Call.PROCMAP_QUERY, error) is not Cause.LONG_NAME:
                raise
        vma = self._put(page, _NO_BUFFER)
        return None if vma is None else replace(vma, name=_LONG_NAME)

    def _put(self, page: int, name: ctypes.Array[ctypes.c_char]) -> LiveVma | None:
        request = bytearray(_QUESTION.pack(_QUESTION.size, 0, page << PAGE_SHIFT, len(name), _address(name)))
        try:
            fcntl.ioctl(self._text.fileno(), PROCMAP_QUERY, request)
        except OSError as error:
            match cause_of(Call.PROCMAP_QUERY, error):
                case Cause.NO_VMA:
                    return None
                case Cause.MM_GONE:
                    raise MmGone from error
            raise
        start, end, flags, page_size, offset, inode, major, minor, name_size = _REPLY.unpack(request)
        return LiveVma(
            start >> PAGE_SHIFT,
            end >> PAGE_SHIFT,
            ACCESSES[flags & 7],
            offset >> PAGE_SHIFT,
            (major, minor),
            inode,
            bool(flags & _SHARED),
            name.value if name_size else b"",
            page_size >> PAGE_SHIFT,
        )

    def first(self, wanted: Callable[[LiveVma], bool], most: int) -> list[LiveVma]:
        """The first `most` VMAs that `wanted` accepts, from the file. Blocks and raises like `vma_at`."""
        return self._untorn(partial(self._read_first, wanted, most))

    def _scan(self, page: int) -> LiveVma | None:
        return self._untorn(partial(self._read_to, page))

    def _untorn(self, read: Callable[[], T]) -> T:
        for _ in range(_SCANS):
            with suppress(Torn), self._text.turn():
                return read()
        raise Undecided("another process keeps reading the maps file that was handed over")

    def _read_first(self, wanted: Callable[[LiveVma], bool], most: int) -> list[LiveVma]:
        return list(islice(filter(wanted, self._vmas()), most))

    def _read_to(self, page: int) -> LiveVma | None:
        for piece in self._pieces():
            last = LINE.match(piece, piece.rfind(b"\n", 0, -1) + 1)
            if last is not None and int(last["end"], 16) >> PAGE_SHIFT <= page:
                continue
            for line in LINE.finditer(piece):
                vma = parsed(line)
                if page < vma.end:
                    return vma if vma.start <= page else None
        return None

    def _vmas(self) -> Iterator[LiveVma]:
        return (parsed(line) for piece in self._pieces() for line in LINE.finditer(piece))

    def _pieces(self) -> Iterator[bytes]:
        self._text.rewind()
        while piece := self._text.read():
            yield piece


def _first_in_each(wanted: Collection[UaddrRange], most: int, vmas: Iterable[LiveVma]) -> list[LiveVma]:
    """The first `most` of the `vmas` in each range. Takes no more of them than it must, and keeps few: there
    may be 65,530."""
    ahead = sorted(wanted, key=lambda uaddrs: uaddrs.start, reverse=True)
    here: dict[UaddrRange, int] = {}
    kept = []
    for vma in vmas:
        while ahead and ahead[-1].start < vma.end:
            here[ahead.pop()] = most
        here = {each: left - 1 for each, left in here.items() if left and vma.start < each.end}
        if here:
            kept.append(vma)
        elif not ahead:
            break
    return kept


class _Names(threading.local):
    """One buffer per thread, to which the kernel writes a name."""

    def __init__(self) -> None:
        self.buffer = ctypes.create_string_buffer(_PATH_MAX)


_NAMES = _Names()
_NO_BUFFER = ctypes.create_string_buffer(0)


def _address(buffer: ctypes.Array[ctypes.c_char]) -> int:
    """The kernel requires a null address with a size of zero."""
    return ctypes.addressof(buffer) if len(buffer) else 0


def parsed(line: re.Match[bytes]) -> LiveVma:
    """The VMA of a line that `LINE` matches."""
    start, end = int(line["start"], 16) >> PAGE_SHIFT, int(line["end"], 16) >> PAGE_SHIFT
    return LiveVma(
        start,
        end,
        RIGHTS[line["rights"]],
        int(line["offset"], 16) >> PAGE_SHIFT,
        (int(line["major"], 16), int(line["minor"], 16)),
        int(line["inode"]),
        line["sharing"] == b"s",
        line["name"],
        end - start,
    )
