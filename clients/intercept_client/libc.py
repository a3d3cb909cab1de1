"""The system calls that change mappings, on bare addresses, which Python's own modules do not offer.

For memory that no guest reaches, or not yet: `intercept_client.memory` has those that change a guest's
memory. Every function raises the `OSError` of its system call, and lets other threads run meanwhile: a munmap
of watched memory waits for the daemon.
"""

from __future__ import annotations

import ctypes
import os
from enum import Enum, IntFlag
from typing import Final

from intercept_protocol.addresses import UaddrRange
from intercept_protocol.outcomes import Access

__all__ = [
    "MAP_ANONYMOUS", "MAP_FIXED", "Remap", "Sharing", "madvise", "mmap", "mprotect", "mremap", "munmap",
    "punch_hole",
]  # fmt: skip

MAP_FIXED: Final = 0x10
MAP_ANONYMOUS: Final = 0x20
FALLOC_FL_KEEP_SIZE: Final = 1
FALLOC_FL_PUNCH_HOLE: Final = 2


class Sharing(Enum):
    """Whether writes reach the file, and other mappings of it: MAP_SHARED and MAP_PRIVATE."""

    SHARED = 1
    PRIVATE = 2


class Remap(IntFlag):
    """MREMAP_*, include/uapi/linux/mman.h."""

    MAYMOVE = 1
    FIXED = 2
    DONTUNMAP = 4


_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long)
_libc.mmap.restype = ctypes.c_void_p
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_libc.mremap.argtypes = (
    ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p,
)  # fmt: skip
_libc.mremap.restype = ctypes.c_void_p
_libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_long, ctypes.c_long)
_FAILED: Final = ctypes.c_void_p(-1).value
"""MAP_FAILED, which mremap returns as well."""


def mmap(
    uaddrs: UaddrRange, access: Access, sharing: Sharing, *, flags: int = 0, file: int = -1, offset: int = 0
) -> UaddrRange:
    """Map as many pages as `uaddrs` has, and return where: there, if `flags` has MAP_FIXED; otherwise the
    kernel
    may choose another place. Without a `file` descriptor the memory is anonymous; `offset` is in bytes."""
    flags |= sharing.value | (MAP_ANONYMOUS if file < 0 else 0)
    uaddr = _libc.mmap(uaddrs.start_uaddr, uaddrs.length, access, flags, file, offset)
    return UaddrRange.of_bytes(_address(uaddr, f"mmap {uaddrs}"), uaddrs.length)


def munmap(uaddrs: UaddrRange) -> None:
    """Unmap `uaddrs`, whatever is mapped there."""
    _check(_libc.munmap(uaddrs.start_uaddr, uaddrs.length), f"munmap {uaddrs}")


def mremap(uaddrs: UaddrRange, length: int, flags: Remap, target: int = 0) -> UaddrRange:
    """Move, grow or shrink a mapping to `length` bytes, and return where it is now.

    `target` is an address, and used only with `Remap.FIXED`.
    """
    uaddr = _libc.mremap(uaddrs.start_uaddr, uaddrs.length, length, flags, target)
    return UaddrRange.of_bytes(_address(uaddr, f"mremap {uaddrs}"), length)


def mprotect(uaddrs: UaddrRange, access: Access) -> None:
    """Change the rights of a mapping. The bits of `Access` are those of PROT_*."""
    _check(_libc.mprotect(uaddrs.start_uaddr, uaddrs.length, access), f"mprotect {uaddrs}")


def madvise(uaddrs: UaddrRange, advice: int) -> None:
    """Advise the kernel; `advice` is one of `mmap.MADV_*`."""
    _check(_libc.madvise(uaddrs.start_uaddr, uaddrs.length, advice), f"madvise {advice} {uaddrs}")


def punch_hole(file: int, offset: int, length: int) -> None:
    """Free a part of a file, in bytes; its size stays."""
    mode = FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE
    what = f"fallocate of descriptor {file}, {length:#x} at {offset:#x}"
    _check(_libc.fallocate(file, mode, offset, length), what)


def _address(value: int | None, what: str) -> int:
    if value is None:  # ctypes gives a null pointer as None
        return 0
    _check(-1 if value == _FAILED else 0, what)
    return value


def _check(result: int, what: str) -> None:
    """Turn libc's -1 into the `OSError` of its errno."""
    if result == -1:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
