"""Changing the VMM's own mappings without leaving the guest a window on what was there.

Owns the system calls that change mappings, each wrapped in an invalidation: begin, the call, end. Must not
know how an invalidation is carried out. A range whose `begin` failed is not touched.
"""

from __future__ import annotations

import ctypes
import os

from intercept_protocol.addresses import UaddrRange

from .blocking_clients import BlockingNotifier

# CDLL lets other threads run during the call, which munmap needs: it may wait for a userfaultfd's reader.
_libc = ctypes.CDLL(None, use_errno=True)
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_libc.munmap.restype = ctypes.c_int


def munmap(notifier: BlockingNotifier, uaddrs: UaddrRange) -> None:
    """Unmap `uaddrs` from this process; blocks until the guest cannot reach it any more, then unmaps.

    Raises `OSError` of the system call, or what `BlockingNotifier.invalidation` raises: from its begin, with
    the mapping untouched; from its end, with the mapping gone. Whatever Python objects look into the range
    must be gone before, as with any munmap.
    """
    with notifier.invalidation(uaddrs):
        _check(_libc.munmap(uaddrs.start_uaddr, uaddrs.length), f"munmap {uaddrs}")


def _check(result: int, what: str) -> None:
    """Turn libc's -1 into the `OSError` of its errno."""
    if result == -1:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
