"""Carrying out a guest's access on memory of this process.

Owns the two ways to do it; must not know the guest, nor whether the memory is still the right one. An access
lies within one page and takes 1 to 8 bytes.
"""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Callable
from typing import Final, Protocol


class Copier(Protocol):
    def read(self, uaddr: int, size: int) -> bytes:
        """Raises `MemoryGone`."""

    def write(self, uaddr: int, data: bytes) -> None:
        """Raises `MemoryGone`."""


class MemoryGone(Exception):
    """Nothing is mapped there any more, or not with that right."""


class DirectCopier:
    """Loads and stores of the access's own width, as a device's registers want them.

    For memory whose every change is announced: what is claimed cannot go. Where it goes all the same, or a
    file was cut off behind it, this is the VMM's own SIGSEGV or SIGBUS.
    """

    def read(self, uaddr: int, size: int) -> bytes:
        if (integer := _WIDTHS.get(size)) and not uaddr % size:
            value: int = integer.from_address(uaddr).value
            return value.to_bytes(size, "little")
        return ctypes.string_at(uaddr, size)

    def write(self, uaddr: int, data: bytes) -> None:
        size = len(data)
        if (integer := _WIDTHS.get(size)) and not uaddr % size:
            integer.from_address(uaddr).value = int.from_bytes(data, "little")
        else:
            ctypes.memmove(uaddr, data, size)


class CheckedCopier:
    """process_vm_readv and process_vm_writev on this very process: an error where a load would be a signal.

    For memory that goes unannounced, under a userfaultfd alone. Device memory (VM_IO, VM_PFNMAP) cannot be
    reached so, and the width of the access is the kernel's business.
    """

    def read(self, uaddr: int, size: int) -> bytes:
        buffer = ctypes.create_string_buffer(size)
        self._transfer(_libc.process_vm_readv, ctypes.addressof(buffer), uaddr, size)
        return buffer.raw

    def write(self, uaddr: int, data: bytes) -> None:
        buffer = ctypes.create_string_buffer(data, len(data))
        self._transfer(_libc.process_vm_writev, ctypes.addressof(buffer), uaddr, len(data))

    def _transfer(self, call: _Call, ours: int, theirs: int, size: int) -> None:
        local, remote = _Iovec(ours, size), _Iovec(theirs, size)
        done = call(os.getpid(), ctypes.byref(local), 1, ctypes.byref(remote), 1, 0)
        if done == size:
            return
        number = ctypes.get_errno() if done < 0 else errno.EFAULT
        if number == errno.EFAULT:
            raise MemoryGone(f"nothing to be reached at uaddr {theirs:#x}")
        raise OSError(number, f"process_vm: {os.strerror(number)}")


_Call = Callable[..., int]


class _Iovec(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


_WIDTHS: Final = {1: ctypes.c_uint8, 2: ctypes.c_uint16, 4: ctypes.c_uint32, 8: ctypes.c_uint64}
_libc = ctypes.CDLL(None, use_errno=True)
for _call in (_libc.process_vm_readv, _libc.process_vm_writev):
    _call.argtypes = (
        ctypes.c_int, ctypes.c_void_p, ctypes.c_ulong, ctypes.c_void_p, ctypes.c_ulong, ctypes.c_ulong,
    )  # fmt: skip
    _call.restype = ctypes.c_ssize_t
