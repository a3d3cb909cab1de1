"""Obstacles to watching a VMM's memory: an older partition, or a process at its limit of mappings.

Owns the verbs, and what was opened first.
"""

from __future__ import annotations

import errno
from contextlib import ExitStack
from pathlib import Path
from typing import Final

from fakes.live_vmm import LiveVmm
from intercept_client import libc
from intercept_protocol.addresses import UaddrRange
from intercept_protocol.outcomes import Access

MAX_MAP_COUNT: Final = int(Path("/proc/sys/vm/max_map_count").read_text())
"""VMAs that a process may have, by proc_sys_vm(5)."""
_older: Final = ExitStack()


def open_another_partition(vmm: LiveVmm) -> None:
    """Over the same memory, by the same process, while the first one stays."""
    _older.push(vmm.vmm)
    _older.push(vmm.notifier)
    vmm.connect(vmm.path)


def close_the_first_partition(_: LiveVmm) -> None:
    _older.close()


def use_up_the_mappings(vmm: LiveVmm) -> UaddrRange:
    """Split some memory until the kernel refuses; returns the memory, which nothing else is in."""
    memory = vmm.map(2 * MAX_MAP_COUNT, access=Access.NONE)
    try:
        for page in range(memory.start + 1, memory.end, 2):
            libc.mprotect(UaddrRange(start=page, end=page + 1), Access.READ)
    except OSError as error:
        if error.errno != errno.ENOMEM:
            raise
    return memory
