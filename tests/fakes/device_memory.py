"""Memory that is VM_IO | VM_PFNMAP, and other memory of anon_inode files, which anybody can map.

Owns the system calls: a perf_event ring takes the place of a BAR, a KVM vCPU's run page that of memory which
looks just so in /proc/PID/maps. Must not know who reads it.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import platform
import struct
from typing import Final

from intercept_client import libc
from intercept_client.libc import Sharing
from intercept_protocol.addresses import UaddrRange
from intercept_protocol.outcomes import Access

PERF_EVENT_OPEN: Final = {"x86_64": 298, "aarch64": 241, "riscv64": 241}
KVM_CREATE_VM, KVM_CREATE_VCPU = 0xAE01, 0xAE41
SOFTWARE, DUMMY = 1, 9
"""PERF_TYPE_SOFTWARE, PERF_COUNT_SW_DUMMY: counts nothing, which needs no privilege."""
EXCLUDE_KERNEL_AND_HYPERVISOR: Final = 0b11 << 5


def perf_ring() -> int:
    """A file whose mapping of one page is VM_PFNMAP. Raises `OSError` if there is none."""
    number = PERF_EVENT_OPEN.get(platform.machine())
    if number is None:
        raise OSError(f"the number of perf_event_open is not known on {platform.machine()}")
    attributes = ctypes.create_string_buffer(128)
    struct.pack_into("<IIQ", attributes, 0, SOFTWARE, 128, DUMMY)
    struct.pack_into("<Q", attributes, 40, EXCLUDE_KERNEL_AND_HYPERVISOR)
    call = ctypes.CDLL(None, use_errno=True).syscall
    numbers = [ctypes.c_long(each) for each in (0, -1, -1, 0)]  # this process, any CPU, no group, no flags
    descriptor: int = call(ctypes.c_long(number), attributes, *numbers)
    if descriptor < 0:
        raise OSError(ctypes.get_errno(), f"perf_event_open: {os.strerror(ctypes.get_errno())}")
    return descriptor


def vcpu() -> int:
    """A file whose mapping of one page is ordinary memory. Raises `OSError` where there is no KVM."""
    machine = fcntl.ioctl(os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC), KVM_CREATE_VM, 0)
    return fcntl.ioctl(machine, KVM_CREATE_VCPU, 0)


def map_at(file: int, page: UaddrRange) -> None:
    """Map over existing mappings."""
    libc.mmap(page, Access.READ, Sharing.SHARED, flags=libc.MAP_FIXED, file=file)
