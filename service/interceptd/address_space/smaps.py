"""Whether a VMA is VM_IO or VM_PFNMAP: only smaps tells.

Owns the search in the smaps text (proc_pid_smaps(5)). Reading it walks every page table of the process, so it
is done when a region is added, and for a backing that was never seen, not on each fault.
"""

from __future__ import annotations

import re

from intercept_protocol.addresses import PAGE_SHIFT

_RECORD = re.compile(
    rb"^(?P<start>[0-9a-f]+)-(?P<end>[0-9a-f]+) [^\n]*\n(?:[A-Z][^\n]*\n)*?VmFlags:(?P<flags>[^\n]*)$",
    re.MULTILINE,
)
"""A VMA's line and its own fields, which begin with a capital: never the flags of the next VMA."""
_IO_FLAGS = {b"io", b"pf"}
"""VM_IO and VM_PFNMAP, fs/proc/task_mmu.c."""


def is_io(smaps: bytes, page: int) -> bool | None:
    """None where no VMA covers the page, or its record has no flags."""
    for record in _RECORD.finditer(smaps):
        if int(record["start"], 16) >> PAGE_SHIFT <= page < int(record["end"], 16) >> PAGE_SHIFT:
            return not _IO_FLAGS.isdisjoint(record["flags"].split())
    return None
