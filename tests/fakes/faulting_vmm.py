"""What a VMM does that hands its guest's memory over as a userfaultfd, for a `Puppet`: the verbs.

Owns the memory of the process that it runs in. Must not know who serves the faults. The calls that may wait
for that let other threads run.
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import socket
import struct
from typing import Final

from fakes.live_vmm import LiveVmm
from intercept_client import libc
from intercept_client.libc import Sharing
from intercept_protocol.addresses import PAGE_SIZE, UaddrRange
from intercept_protocol.outcomes import Access

SYS_USERFAULTFD: Final = 323 if os.uname().machine == "x86_64" else 282
UFFDIO_API: Final = 0xC018AA3F
UFFDIO_REGISTER: Final = 0xC020AA00
FEATURE_EVENT_REMOVE: Final = 1 << 3
MODE_MISSING: Final = 1
USER_MODE_ONLY: Final = 1
MAP_NORESERVE: Final = 0x4000
MAP_HUGETLB: Final = 0x40000
_libc = ctypes.CDLL(None, use_errno=True)
_libc.memcpy.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
_libc.memcmp.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)


def hand_over(_: LiveVmm, address: str, counts: list[int], *, huge: bool = False) -> list[UaddrRange]:
    """Map that many pages a region, have missing ones reported, and send the userfaultfd to who listens."""
    flags = MAP_NORESERVE | (MAP_HUGETLB if huge else 0)
    uffd = _libc.syscall(SYS_USERFAULTFD, os.O_CLOEXEC | os.O_NONBLOCK | USER_MODE_ONLY)
    if uffd < 0:
        raise OSError(ctypes.get_errno(), "userfaultfd")
    fcntl.ioctl(uffd, UFFDIO_API, bytearray(struct.pack("<3Q", 0xAA, FEATURE_EVENT_REMOVE, 0)))
    regions = []
    for count in counts:
        anywhere = UaddrRange(start=0, end=count)
        memory = libc.mmap(anywhere, Access.READ | Access.WRITE, Sharing.PRIVATE, flags=flags)
        request = struct.pack("<4Q", memory.start_uaddr, memory.length, MODE_MISSING, 0)
        fcntl.ioctl(uffd, UFFDIO_REGISTER, bytearray(request))
        regions.append(memory)
    with socket.socket(socket.AF_UNIX) as peer:
        peer.connect(address)
        socket.send_fds(peer, [b"uffd"], [uffd])
    os.close(uffd)
    return regions


def read_word(_: LiveVmm, page: int) -> int:
    """The first eight bytes of a page, as its guest would read them."""
    word = ctypes.c_uint64()
    _libc.memcpy(ctypes.addressof(word), page * PAGE_SIZE, 8)
    return word.value


def write_word(_: LiveVmm, page: int, value: int) -> None:
    word = ctypes.c_uint64(value)
    _libc.memcpy(page * PAGE_SIZE, ctypes.addressof(word), 8)


def read_words(vmm: LiveVmm, uaddrs: UaddrRange) -> list[int]:
    return [read_word(vmm, page) for page in range(uaddrs.start, uaddrs.end)]


def give_back(_: LiveVmm, uaddrs: UaddrRange) -> None:
    """As a balloon does."""
    libc.madvise(uaddrs, mmap.MADV_DONTNEED)


def unmap(_: LiveVmm, uaddrs: UaddrRange) -> None:
    libc.munmap(uaddrs)


def sweep(_: LiveVmm, uaddrs: UaddrRange) -> None:
    """Touch all pages in order, in one call."""
    _libc.memcmp(uaddrs.start_uaddr, uaddrs.start_uaddr, uaddrs.length)
