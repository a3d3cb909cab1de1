"""Memory that is locked into RAM, as VMMs offer for their guests.

Owns the system call; must not know what the memory is for.
"""

from __future__ import annotations

import ctypes
import os

import pytest

from intercept_protocol.addresses import UaddrRange

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mlock.argtypes = (ctypes.c_void_p, ctypes.c_size_t)


def lock(uaddrs: UaddrRange) -> None:
    """mlock(2), or a skip with the reason."""
    if _libc.mlock(uaddrs.start_uaddr, uaddrs.length) < 0:
        pytest.skip(f"mlock: {os.strerror(ctypes.get_errno())}")
