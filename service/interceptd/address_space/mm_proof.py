"""Proof that a userfaultfd watches the process whose maps file came with it.

Owns the experiment. A userfaultfd belongs to the mm of the process that created it. A child that inherited it
would register memory of the parent, without an error wherever the parent has memory at that address, and get
no event for its own unmaps. Must not know trio: the experiment waits for the mmap locks of both processes, so
it belongs in a worker thread.

We register one page in the middle of ordinary memory. In the right mm the VMA splits there, because
neighbours with different userfaultfds cannot be one VMA, and the maps file shows a VMA of exactly that page;
after unregistering it is gone. No fault is raised meanwhile, and the VMM may use the page freely.
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
"""Registrations without a split that prove another mm; not one, as the VMM may unmap a page meanwhile."""
CANDIDATES = 256
"""VMAs to try, the smallest first: other userfaultfds may hold many."""
MIDDLE_OF = 3
"""Pages that a VMA must have to split in three."""


class NotOfThisMm(Exception):
    """Another process created the userfaultfd, or this one has no memory to prove the contrary."""


def prove(userfaultfd: Userfaultfd, maps: ProcMaps) -> None:
    """Raises `NotOfThisMm`, `MmGone`, and `Undecided` if the kernel has no memory for the experiment or other
    userfaultfds hold all suitable memory."""
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
    """Whether the maps file shows both registering and unregistering the page; or why it cannot be
    registered, which proves nothing."""
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
    """After ENOMEM: unregistering an unregistered page needs no memory, so ENOMEM again means no mm."""
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
