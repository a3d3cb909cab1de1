"""The regions that a VMM asked for, and the check that a daemon maps nothing else.

Owns the list of one `vmm` connection's regions, kept up with its requests, and the check of a map request
against it (Y-12). Must not know connections, nor how a guest is mapped. The daemon decides when a guest
reaches the VMM's memory; a daemon that is broken, or was taken over, must not decide that the guest reaches
the VMM's heap.
"""

from __future__ import annotations

import errno
import threading
from functools import partial
from typing import Final

import msgspec
from sortedcontainers import SortedDict

from intercept_protocol.addresses import GfnRange, RangeError, UaddrRange
from intercept_protocol.errors import WireError
from intercept_protocol.messages import AddRegion, RemoveRegion
from intercept_protocol.outcomes import Access, allows, spelled

from ._exchange import Exchange, Progress, Reply

_NEVER_ADDED: Final = (Progress.REFUSED, Progress.WITHDRAWN)


class _Region(msgspec.Struct, eq=False, gc=False):
    """`gfns` and `uaddrs` have the same length."""

    gfns: GfnRange
    uaddrs: UaddrRange
    access: Access


class OwnRegions:
    """What a VMM lets its guest reach: the regions that the daemon has, or may have. Thread-safe.

    `BlockingVmm.regions` and `TrioVmm.regions` keep up with their connection by themselves, whichever method
    sends the request. Only a VMM that serves its hypervisor connection in another process than its main one
    makes a list there, and calls `add` and `remove`.
    """

    def __init__(self) -> None:
        self._by_start: SortedDict[int, _Region] = SortedDict()
        self._lock = threading.Lock()

    def add(self, gfns: GfnRange, uaddrs: UaddrRange, *, writable: bool, executable: bool) -> None:
        """Let the daemon map `uaddrs` at `gfns` from now on; call it before the daemon is asked to add it.

        A region that overlaps one in the list stays out of it: the daemon has to refuse it (P-7).
        """
        self._insert(_Region(gfns, uaddrs, _rights(writable=writable, executable=executable)))

    def remove(self, gfns: GfnRange) -> None:
        """Let the daemon map nothing there any more; call it when the daemon has removed the region."""
        self._remove(gfns.start)

    def require(self, gfns: GfnRange, uaddrs: UaddrRange, access: Access) -> None:
        """Raise `WireError` EPERM unless one region covers `gfns`, at these `uaddrs` and with these rights.

        `gfns` and `uaddrs` have the same length.
        """
        with self._lock:
            region = self._last_from(gfns.start)
        if region is None or gfns.start not in region.gfns:
            objection = f"no region of this VMM has gfn {gfns.start:#x}"
        elif not region.gfns.covers(gfns):
            objection = f"the region ends at gfn {region.gfns.end:#x}"
        elif uaddrs.start - gfns.start != region.uaddrs.start - region.gfns.start:
            objection = f"the region has gfns {region.gfns} at uaddrs {region.uaddrs}"
        elif not allows(region.access, access):
            objection = f"the region has {spelled(region.access)}"
        else:
            return
        asked = f"gfns {gfns} to uaddrs {uaddrs} with {spelled(access)}"
        raise WireError(errno.EPERM, f"map_gpa of {asked}: {objection}")

    def follow(self, exchange: Exchange[Reply]) -> Exchange[Reply]:
        """Keep up with a request of the `vmm` connection from before it is sent until it is answered.

        A region counts from before its request is sent, because the daemon may map it before it answers, and
        until the daemon has said that it was not added, or that it was removed. So one whose answer is
        outstanding, or will never come, counts. Returns the `exchange`.
        """
        match exchange.call:
            case AddRegion() as call if (region := _region(call)) is not None:
                exchange.on_progress = partial(self._adding, region)
            case RemoveRegion(start_gfn=start):
                exchange.on_progress = partial(self._removing, start)
        return exchange

    def _adding(self, region: _Region, progress: Progress) -> None:
        if progress is Progress.IN_FLIGHT:
            self._insert(region)
        elif progress in _NEVER_ADDED:
            self._forget(region)

    def _removing(self, start_gfn: int, progress: Progress) -> None:
        if progress is Progress.ANSWERED:
            self._remove(start_gfn)

    def _insert(self, region: _Region) -> None:
        with self._lock:
            other = self._last_from(region.gfns.end - 1)
            if other is None or not other.gfns.overlaps(region.gfns):
                self._by_start[region.gfns.start] = region

    def _remove(self, start_gfn: int) -> None:
        with self._lock:
            self._by_start.pop(start_gfn, None)

    def _forget(self, region: _Region) -> None:
        """Not another one at the same gfns, which was there before."""
        with self._lock:
            if self._by_start.get(region.gfns.start) is region:
                del self._by_start[region.gfns.start]

    def _last_from(self, gfn: int) -> _Region | None:
        """The last region that begins at `gfn` or before; the lock is held."""
        index = self._by_start.bisect_right(gfn)
        return self._by_start.peekitem(index - 1)[1] if index else None


def _region(call: AddRegion) -> _Region | None:
    """None for ranges that are none, which the daemon has to refuse (P-4)."""
    try:
        gfns = GfnRange.of(call.start_gfn, call.page_count)
        uaddrs = UaddrRange.of_pages(call.start_uaddr, call.page_count)
    except RangeError:
        return None
    return _Region(gfns, uaddrs, _rights(writable=call.writable, executable=call.executable))


def _rights(*, writable: bool, executable: bool) -> Access:
    rights = Access.READ
    if writable:
        rights |= Access.WRITE
    if executable:
        rights |= Access.EXECUTE
    return rights
