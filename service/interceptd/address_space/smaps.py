"""Whether a VMA is VM_IO or VM_PFNMAP. Only smaps shows it, and reading it costs a walk of the page tables.

Owns the search in the smaps text (proc_pid_smaps(5)), which stops at the VMA in question, and a cache of what
it has read. Must not know trio: `read` belongs in a worker thread, the rest never blocks.

One thread reads at a time; those that wait usually find their answer in the cache. A later VMA continues
where the last search stopped, so that the first touches of all VMAs together cost one pass. What an
invalidation has removed from the cache costs another pass from the beginning.
"""

from __future__ import annotations

import re

from intercept_protocol.addresses import PAGE_LIMIT, UaddrRange
from interceptd.address_space.known_io import KnownIo, KnownVma
from interceptd.address_space.live_vma import LiveVma
from interceptd.address_space.proc_text import ProcText, Torn
from interceptd.address_space.procmaps import LINE, parsed
from interceptd.memory_budget import CacheShare

_FLAGS = re.compile(rb"\nVmFlags:([^\n]*)(?:\n|\Z)")
"""The last line of a record. A name cannot look like it: the kernel writes a line end in it as \\012."""
_NO_FIELD = re.compile(rb"\n(?![A-Z])")
"""Before a line that is not a field of the record above it."""
_IO_FLAGS = {b"io", b"pf"}
"""VM_IO and VM_PFNMAP, fs/proc/task_mmu.c."""


class Smaps:
    """An open smaps file of some process. Owns the descriptor."""

    def __init__(self, descriptor: int) -> None:
        self._text = ProcText(descriptor)
        self._known = KnownIo()
        self._reached = 0
        """The page up to which the pass has read. Use it only within a turn."""

    def bound_cache(self, share: CacheShare) -> None:
        """Before the first question: remember no more than `share` has room for."""
        self._known.share = share

    def close(self) -> None:
        self._known.close()
        self._text.close()

    def fileno(self) -> int:
        return self._text.fileno()

    def detach(self) -> int:
        """Give up the descriptor, which is the caller's to close."""
        self._known.close()
        return self._text.detach()

    def known(self, vma: LiveVma, page: int) -> bool | None:
        """Whether `vma`, which covers the page, is device memory; None if not in the cache."""
        return self._known.io_of(vma, page)

    def read(self, vma: LiveVma, page: int) -> bool | None:
        """The same, reading on if necessary; None if the text now shows another VMA there, or none.

        Blocks for its turn and for the process's mmap lock. Raises `MmGone` and `Undecided`.
        """
        with self._text.turn():
            known = self._known.io_of(vma, page)
            return known if known is not None else self._read_to(vma, page)

    def forget(self, uaddrs: UaddrRange) -> None:
        """Drop `uaddrs` from the cache: other VMAs may be there from now on. Never blocks."""
        self._known.forget(uaddrs)

    def _read_to(self, vma: LiveVma, page: int) -> bool | None:
        if page < self._reached:
            self._rewind()
        self._known.read_on(self._reached)
        try:
            while piece := self._text.read():
                records = parse_records(piece)
                self._known.learn(records)
                self._reached = records[-1].end if records else self._reached
                if page < self._reached:
                    return _io_of(records, vma, page)
        except Torn:
            pass
        self._reached = PAGE_LIMIT  # the next question starts a new pass
        return None

    def _rewind(self) -> None:
        self._text.rewind()
        self._known.start_over()
        self._reached = 0


def parse_records(piece: bytes) -> list[KnownVma]:
    """The VMAs of whole records. Skips a record without flags.

    Splits the text instead of matching each of its 23 lines, which takes twice as long.
    """
    found = []
    texts = _FLAGS.split(piece)
    for text, flags in zip(texts[0:-1:2], texts[1::2], strict=True):
        start = 0
        for skipped in _NO_FIELD.finditer(text):
            start = skipped.end()
        if header := LINE.match(text, start):
            vma = parsed(header)
            io = not _IO_FLAGS.isdisjoint(flags.split())
            found.append(KnownVma(vma.start, vma.end, vma.identity, io))
    return found


def _io_of(records: list[KnownVma], vma: LiveVma, page: int) -> bool | None:
    for record in records:
        if record.start <= page < record.end and record.identity == vma.identity:
            return record.io
    return None
