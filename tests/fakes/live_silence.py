"""A VMM that cannot have a userfaultfd.

Owns the verbs.
"""

from __future__ import annotations

import ctypes
import errno
import platform
from typing import Final

from fakes import under_seccomp
from fakes.live_vmm import GFN, LiveVmm
from intercept_protocol.outcomes import AnyAnswer

PAGES: Final = 4
IOCTL: Final = {"x86_64": 16, "aarch64": 29}
IOC_NEW: Final = 0xAA00
"""USERFAULTFD_IOC_NEW, include/uapi/linux/userfaultfd.h: what /dev/userfaultfd is for."""


def refuse_userfaultfds(_: LiveVmm) -> None:
    """From now on the process gets none, as in a container: its seccomp profile refuses the system call, and
    its device policy the device."""
    machine = platform.machine()
    under_seccomp.refuse(under_seccomp.NUMBERS[machine], errno.EPERM)
    under_seccomp.refuse(IOCTL[machine], errno.EPERM, where=(1, IOC_NEW))


def touch_new_region(vmm: LiveVmm) -> AnyAnswer:
    """The first touch of new memory in a new region."""
    vmm.add_region(GFN, vmm.map_memfd(PAGES).uaddrs)
    return vmm.fault(GFN)


def try_without_user_mode_only(_: LiveVmm) -> int:
    """The errno that the system call answers to a client that leaves out the flag; 0 if it gets one."""
    libc = ctypes.CDLL(None, use_errno=True)
    return 0 if libc.syscall(under_seccomp.NUMBERS[platform.machine()], 0) >= 0 else ctypes.get_errno()
