"""Waits for one socket for less than a millisecond, to which Python's own calls round up.

Owns the call (ppoll(2)). Must not know what is waited for, nor when that is worth holding up the event loop.
"""

from __future__ import annotations

import ctypes
import select

MOMENT_NS = 100_000
"""Nanoseconds in which a peer that can run is woken up and has answered: usually that takes a third."""


class _PollFd(ctypes.Structure):
    _fields_ = (("fd", ctypes.c_int), ("events", ctypes.c_short), ("revents", ctypes.c_short))


class _Timespec(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


_ppoll = ctypes.CDLL(None).ppoll
_ppoll.argtypes = (ctypes.POINTER(_PollFd), ctypes.c_ulong, ctypes.POINTER(_Timespec), ctypes.c_void_p)
_ppoll.restype = ctypes.c_int
_MOMENT = ctypes.pointer(_Timespec(0, MOMENT_NS))
_ASKED = _PollFd(0, select.POLLIN, 0)
"""One for all calls: only the event loop's thread makes any."""
_ASKED_AT = ctypes.pointer(_ASKED)


def readable_in_a_moment(descriptor: int) -> bool:
    """Block the thread until the socket is readable, or for a moment; true if it is, or was closed."""
    _ASKED.fd = descriptor
    return bool(_ppoll(_ASKED_AT, 1, _MOMENT, None) > 0)
