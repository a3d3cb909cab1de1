"""Creating a userfaultfd, and finding out which permission is missing if that fails.

Owns the two ways, the system call and /dev/userfaultfd, and interpreting their errors. Must not initialise
what it creates: UFFDIO_API is for the daemon to call.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import platform
from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import Final

USERFAULTFD_DEVICE: Final = "/dev/userfaultfd"
USERFAULTFD_SYSCTL: Final = "/proc/sys/vm/unprivileged_userfaultfd"
USER_MODE_ONLY: Final = 1
"""UFFD_USER_MODE_ONLY (Linux 5.11), include/uapi/linux/userfaultfd.h: needs no privilege. It costs nothing:
the daemon registers ranges so that they never raise a fault."""
IOC_NEW: Final = 0xAA00
"""USERFAULTFD_IOC_NEW (Linux 6.1), _IO(0xAA, 0)."""
_SYSTEM_CALLS: Final = {"x86_64": 323, "aarch64": 282, "riscv64": 282}
_FLAGS: Final = os.O_CLOEXEC | os.O_NONBLOCK
_NO_ROOM: Final = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM})
"""userfaultfd(2): errors that say nothing about the kernel or a permission."""
_libc = ctypes.CDLL(None, use_errno=True)


class Permission(Enum):
    """What keeps a process from creating a userfaultfd; removing one of them is enough."""

    SECCOMP = "a seccomp filter or security module refuses the system call"
    SYSCTL = "sysctl vm.unprivileged_userfaultfd is 0 and the process lacks CAP_SYS_PTRACE"
    DEVICE_MODE = f"the mode of {USERFAULTFD_DEVICE} keeps this user out"
    DEVICE_SECCOMP = f"a seccomp filter, security module or device policy refuses {USERFAULTFD_DEVICE}"


class UserfaultfdUnavailable(OSError):
    """This process cannot create a userfaultfd; `errno` is the system call's."""


class UserfaultfdNotSupported(UserfaultfdUnavailable):
    """The kernel was built without userfaultfd."""


class UserfaultfdNotPermitted(UserfaultfdUnavailable):
    """The kernel has userfaultfd, and refuses it to this process; any one of `missing` would help."""

    def __init__(self, number: int, text: str, missing: Sequence[Permission]) -> None:
        super().__init__(number, text)
        self.missing = tuple(missing)


class _SysctlRefused(PermissionError):
    """The system call was refused without USER_MODE_ONLY, which needs the sysctl or a capability."""


def open_userfaultfd() -> int:
    """Create a userfaultfd of this process, not initialised, with O_NONBLOCK and O_CLOEXEC.

    Raises `UserfaultfdNotPermitted` or `UserfaultfdNotSupported` if neither way works, and a plain `OSError`
    if no descriptor or no memory is left: that may pass.
    """
    try:
        return _by_system_call(_FLAGS | USER_MODE_ONLY)
    except OSError as error:
        if error.errno in _NO_ROOM:
            raise
        system_call = error
    try:
        return _by_device(_FLAGS | USER_MODE_ONLY)
    except OSError as device:
        if device.errno in _NO_ROOM:
            raise
        raise unavailable(system_call, device, kernel_has_it=Path(USERFAULTFD_SYSCTL).exists()) from device


def unavailable(
    system_call: OSError, device: OSError, *, kernel_has_it: bool
) -> UserfaultfdNotSupported | UserfaultfdNotPermitted:
    """What the two refusals mean.

    With USER_MODE_ONLY the kernel itself refuses nobody, so EPERM there is a filter's; EPERM without it, on
    kernels before 5.11, is the sysctl's. Filters also say ENOSYS, where the kernel could.
    """
    missing = []
    if isinstance(system_call, PermissionError):
        sysctl = isinstance(system_call, _SysctlRefused)
        missing.append(Permission.SYSCTL if sysctl else Permission.SECCOMP)
    elif kernel_has_it:
        missing.append(Permission.SECCOMP)
    if device.errno == errno.EACCES:
        missing.append(Permission.DEVICE_MODE)
    elif device.errno == errno.EPERM:
        missing.append(Permission.DEVICE_SECCOMP)
    number = system_call.errno or errno.ENOSYS
    device_said = os.strerror(device.errno or errno.ENOENT)
    said = f"userfaultfd: {os.strerror(number)}; {USERFAULTFD_DEVICE}: {device_said}"
    if not missing:
        return UserfaultfdNotSupported(number, f"{said}: the kernel was built without it")
    ways = ", and ".join(permission.value for permission in missing)
    return UserfaultfdNotPermitted(number, f"{said}: {ways}", missing)


def _by_system_call(flags: int) -> int:
    try:
        return _system_call(flags)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
    try:
        return _system_call(flags & ~USER_MODE_ONLY)
    except PermissionError as error:
        raise _SysctlRefused(error.errno, error.strerror) from error


def _system_call(flags: int) -> int:
    number = _SYSTEM_CALLS.get(platform.machine())
    if number is None:
        raise OSError(errno.ENOSYS, f"the number of userfaultfd is not known on {platform.machine()}")
    descriptor: int = _libc.syscall(ctypes.c_long(number), ctypes.c_long(flags))
    if descriptor < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return descriptor


def _by_device(flags: int) -> int:
    device = os.open(USERFAULTFD_DEVICE, os.O_RDWR | os.O_CLOEXEC)
    try:
        return fcntl.ioctl(device, IOC_NEW, flags)
    finally:
        os.close(device)
