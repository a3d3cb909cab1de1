"""Which of this process's memory is a device's, and may be touched by a load or store of our own.

Owns the decision, which depends on the VMA and on no errno. Must not know who wants to touch it.
"""

from __future__ import annotations

import errno
import re
from typing import Final

from intercept_client import libc
from intercept_protocol.addresses import PAGE_SIZE, Uaddr, UaddrRange
from intercept_protocol.outcomes import Access

MADV_POPULATE_READ: Final = 22
"""Linux 5.14, include/uapi/asm-generic/mman-common.h."""
SMAPS: Final = "/proc/thread-self/smaps"
"""/proc/self is the main thread's, and empty once that has exited."""
_HEADER: Final = re.compile(rb"([0-9a-f]+)-([0-9a-f]+) ")
_DEVICE_FLAGS: Final = frozenset((b"io", b"pf"))
"""VM_IO and VM_PFNMAP; VmFlags in proc_pid_smaps(5)."""
_RIGHTS: Final = {Access.READ: b"rd", Access.WRITE: b"wr"}


def is_device(uaddr: int, access: Access) -> bool:
    """Whether `uaddr` lies in a VM_IO or VM_PFNMAP mapping that permits the access (READ or WRITE).

    Blocks while smaps is read up to `uaddr`, unless the kernel can populate the page or at least tries to: it
    never tries on a device's. Raises `OSError` if smaps cannot be read.
    """
    return not _can_be_populated(uaddr) and _permits(_vm_flags(uaddr), access)


def _can_be_populated(uaddr: int) -> bool:
    """A shortcut only: EINVAL has other causes too, such as missing rights and a kernel before 5.14."""
    try:
        libc.madvise(UaddrRange.of_pages(Uaddr(uaddr & -PAGE_SIZE), 1), MADV_POPULATE_READ)
    except OSError as error:
        return error.errno != errno.EINVAL
    return True


def _permits(flags: frozenset[bytes], access: Access) -> bool:
    return _RIGHTS[access] in flags and not flags.isdisjoint(_DEVICE_FLAGS)


def _vm_flags(uaddr: int) -> frozenset[bytes]:
    """Those of the VMA at `uaddr`; none where nothing is mapped."""
    is_there = False
    with open(SMAPS, "rb") as smaps:
        for line in smaps:
            if is_there and line.startswith(b"VmFlags:"):
                return frozenset(line.split()[1:])
            if (header := _HEADER.match(line)) is not None:
                is_there = int(header[1], 16) <= uaddr < int(header[2], 16)
    return frozenset()
