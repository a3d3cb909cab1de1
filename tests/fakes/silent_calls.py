"""The system calls that replace what is mapped and send no userfaultfd event.

Owns their signatures (shmat(2), remap_file_pages(2)). Must not know who notices.
"""

from __future__ import annotations

import ctypes
import os

from intercept_protocol.addresses import UaddrRange

IPC_PRIVATE, IPC_RMID = 0, 0
OWNER_MAY = 0o600
SHM_REMAP = 0o40000
"""include/uapi/linux/shm.h."""
_libc = ctypes.CDLL(None, use_errno=True)
_libc.shmget.argtypes = (ctypes.c_int, ctypes.c_size_t, ctypes.c_int)
_libc.shmat.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_int)
_libc.shmat.restype = ctypes.c_void_p
_libc.remap_file_pages.argtypes = (
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_size_t,
    ctypes.c_int,
)


def attach_segment_over(uaddrs: UaddrRange) -> None:
    """Put a new System V segment there, which goes when it is detached."""
    segment = _libc.shmget(IPC_PRIVATE, uaddrs.length, OWNER_MAY)
    attached = _libc.shmat(segment, uaddrs.start_uaddr, SHM_REMAP) == uaddrs.start_uaddr
    number = ctypes.get_errno()
    _libc.shmctl(segment, IPC_RMID, None)
    _check(0 if attached else number, "shmat")


def remap_file_pages(uaddrs: UaddrRange, first_page: int) -> None:
    """Have a part of a shared mapping show other pages of its file."""
    refused = _libc.remap_file_pages(uaddrs.start_uaddr, uaddrs.length, 0, first_page, 0)
    _check(ctypes.get_errno() if refused else 0, "remap_file_pages")


def _check(number: int, what: str) -> None:
    if number:
        raise OSError(number, f"{what}: {os.strerror(number)}")
