"""Proof that a userfaultfd watches the process whose maps file came with it.

Owns the experiment. A userfaultfd belongs to the mm of the process that created it, also in the hands of a
child that inherited it: there it registers in the parent, without an error wherever the parent has memory at
that address, and reports no unmap of the child's. Must not know trio: the experiment waits for the mmap lock
of both processes, so it belongs in a worker thread.

One page in the middle of ordinary memory is registered: in the right mm the VMA splits there, because
neighbours that differ in their userfaultfd cannot be one VMA, and the maps file shows a VMA of just that
page. Unregistered, it is gone again. No fault is raised meanwhile, and the VMM may do with the page what it
likes.
"""

from __future__ import annotations

from contextlib import suppress

from intercept_protocol.addresses import UaddrRange
from interceptd.address_space import Undecided
from interceptd.address_space.live_vma import LiveVma
from interceptd.address_space.procmaps import ProcMaps
from interceptd.address_space.refusals import Call, Cause, cause_of
from interceptd.address_space.userfaultfd import Userfaultfd

TRIALS = 3
"""Registrations without a split before a userfaultfd is another mm's: the VMM may unmap one meanwhile."""
CANDIDATES = 256
"""VMAs that are tried, the smallest first: other userfaultfds may hold many."""
MIDDLE_OF = 3
"""Pages that a VMA must have to split in three."""


class NotOfThisMm(Exception):
    """The userfaultfd was created by another process, or this one has no memory to show the contrary."""


def prove(userfaultfd: Userfaultfd, maps: ProcMaps) -> None:
    """Raises `NotOfThisMm`, `MmGone`, and `Undecided` if the kernel has no room for the experiment or other
    userfaultfds hold all the memory that could show anything."""
    trials, held = 0, False
    for vma in sorted(maps.first(_is_suitable, CANDIDATES), key=lambda vma: vma.end - vma.start):
        page = (vma.start + vma.end) // 2
        seen = _splits(userfaultfd, maps, UaddrRange(start=page, end=page + 1))
        if seen is True:
            return
        trials += seen is False
        held |= seen is Cause.HELD
        if trials == TRIALS:
            break
    if held and not trials:
        raise Undecided.because(Cause.HELD)
    raise NotOfThisMm


def _splits(userfaultfd: Userfaultfd, maps: ProcMaps, page: UaddrRange) -> bool | Cause:
    """Whether registering the page shows in the maps file, and unregistering it as well; or why it cannot be
    registered, which shows nothing."""
    try:
        userfaultfd.register(page)
    except OSError as error:
        refusal = cause_of(Call.UFFDIO_REGISTER, error)
        if refusal is not Cause.NO_ROOM:
            return refusal
        if _mm_is_gone(userfaultfd, page):
            raise NotOfThisMm from error
        raise Undecided.because(refusal, "UFFDIO_REGISTER: ENOMEM") from error
    try:
        registered = _is_vma(maps, page)
    finally:
        with suppress(OSError):  # the VMM has unmapped it
            userfaultfd.unregister(page)
    return registered and not _is_vma(maps, page)


def _mm_is_gone(userfaultfd: Userfaultfd, page: UaddrRange) -> bool:
    """After ENOMEM: to unregister what is not registered takes no room, and fails so only without an mm."""
    try:
        userfaultfd.unregister(page)
    except OSError as error:
        return cause_of(Call.UFFDIO_REGISTER, error) is Cause.NO_ROOM
    return False


def _is_vma(maps: ProcMaps, page: UaddrRange) -> bool:
    vma = maps.vma_at(page.start)
    return vma is not None and (vma.start, vma.end) == (page.start, page.end)


def _is_suitable(vma: LiveVma) -> bool:
    return not vma.shared and not vma.inode and vma.end - vma.start >= MIDDLE_OF
