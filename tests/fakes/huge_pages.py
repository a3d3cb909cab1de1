"""Huge pages for a test, which the machine need not have set aside.

Owns the reservation (vm.nr_hugepages, hugetlbpage.rst) and gives it back. One test at a time has it, on the
whole machine: what it gives back is what it found.
"""

from __future__ import annotations

import fcntl
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from fakes.live_vmm import LiveVmm
from intercept_client import libc
from intercept_client.libc import Sharing
from intercept_protocol.addresses import PAGE_SIZE, UaddrRange
from intercept_protocol.outcomes import Access

SYSCTL: Final = Path("/proc/sys/vm/nr_hugepages")
HUGE: Final = 512
"""Pages in a huge one of 2 MiB, the usual size on x86-64 and arm64."""
START: Final = 0x30_0000_0000 // PAGE_SIZE
"""A multiple of `HUGE` where nothing is."""
MAP_HUGETLB: Final = 0x40000


@contextmanager
def reserved(count: int) -> Iterator[bool]:
    """Whether that many huge pages of 2 MiB are free within the block."""
    with SYSCTL.open() as sysctl:
        fcntl.flock(sysctl, fcntl.LOCK_EX)
        before = SYSCTL.read_text()
        with suppress(PermissionError):
            SYSCTL.write_text(str(int(before) + count))
        try:
            yield _free() >= count and _meminfo("Hugepagesize") == HUGE * PAGE_SIZE // 1024
        finally:
            with suppress(PermissionError):
                SYSCTL.write_text(before)


def _free() -> int:
    return _meminfo("HugePages_Free") - _meminfo("HugePages_Rsvd")


def _meminfo(name: str) -> int:
    found = re.search(rf"^{name}:\s+(\d+)", Path("/proc/meminfo").read_text(), re.MULTILINE)
    return int(found[1]) if found else 0


def map_huge(_: LiveVmm, count: int, sharing: Sharing) -> UaddrRange:
    """Map `count` huge pages, private ones or of a memfd."""
    file = -1
    if sharing is Sharing.SHARED:
        file = os.memfd_create("ram", os.MFD_HUGETLB)
        os.truncate(file, count * HUGE * PAGE_SIZE)
    flags = libc.MAP_FIXED | (MAP_HUGETLB if file < 0 else 0)
    at = UaddrRange(start=START, end=START + count * HUGE)
    return libc.mmap(at, Access.READ | Access.WRITE, sharing, flags=flags, file=file)
