"""Carrying out a guest's access on memory of this process.

Owns the ways to do it; must not know the guest, nor whether the memory is still the right memory. An
access lies within one page and has 1 to 8 bytes.

A guest can touch memory that faults: a truncated file behind its mapping, a guard page. A load by this
process would raise a signal that ends the VMM. So the kernel copies, and returns EFAULT instead:
`CheckedCopier`. It uses copy_from_user and copy_to_user, as KVM's own instruction emulator does; neither
guarantees that other vCPUs see an aligned access as a whole.

A device's registers need exactly one load or store of the access's width, which no system call promises: a
write(2) into a pipe reaches VM_PFNMAP memory and faults safely, but may copy byte by byte (`rep movsb`), and
process_vm_readv(2) refuses such memory. So there, and only there, this process makes the access itself:
`DirectCopier`.
"""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Callable
from typing import Final, Protocol

from intercept_protocol.outcomes import Access

from ._device_memory import is_device


class Copier(Protocol):
    def read(self, uaddr: int, size: int) -> bytes:
        """Raises `MemoryGone`."""

    def write(self, uaddr: int, data: bytes) -> None:
        """Raises `MemoryGone`."""


class MemoryGone(Exception):
    """Nothing is mapped there any more, or not with that right."""


class DirectCopier:
    """Loads and stores of the access's own width, as a device's registers want them.

    Where the memory faults, the VMM itself gets SIGSEGV or SIGBUS.
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
    """process_vm_readv and process_vm_writev on this process: an error where a load would raise a signal.

    For ordinary memory, even if it is unmapped without announcement. Memory that the kernel does not copy for
    others (VM_IO, VM_PFNMAP, memfd_secret) counts as gone.
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
            raise MemoryGone(f"uaddr {theirs:#x} faults")
        raise OSError(number, f"process_vm: {os.strerror(number)}")


class AnnouncedCopier:
    """For memory whose every change is announced: checked, and direct on a device's registers.

    A device that no longer answers (VFIO with memory decoding off) raises SIGBUS: remove its region before
    turning it off, so that the guest's accesses no longer reach it.
    """

    def __init__(self) -> None:
        self._checked = CheckedCopier()
        self._direct = DirectCopier()

    def read(self, uaddr: int, size: int) -> bytes:
        try:
            return self._checked.read(uaddr, size)
        except MemoryGone:
            _require_device(uaddr, Access.READ)
        return self._direct.read(uaddr, size)

    def write(self, uaddr: int, data: bytes) -> None:
        try:
            self._checked.write(uaddr, data)
        except MemoryGone:
            _require_device(uaddr, Access.WRITE)
            self._direct.write(uaddr, data)


def _require_device(uaddr: int, access: Access) -> None:
    """Raises `MemoryGone` unless a load or store of our own there is a device's to answer."""
    try:
        if is_device(uaddr, access):
            return
    except OSError as error:
        raise MemoryGone(f"uaddr {uaddr:#x} faults, and its VMA is unknown: {error}") from error
    raise MemoryGone(f"uaddr {uaddr:#x} faults")


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
