"""The regions that a VMM asked for, and the check that a daemon maps nothing else.

Owns the lists of one `vmm` connection's regions and declared VMAs, kept up with its requests, and the check
of a map request against them (Y-12). Must not know connections, nor how a guest is mapped. The daemon decides
when a guest reaches the VMM's memory; a daemon that is broken, or was taken over, must not decide that the
guest reaches the VMM's heap.
"""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Final

from intercept_protocol.addresses import PAGE_SHIFT, GfnRange, RangeError, UaddrRange
from intercept_protocol.errors import WireError
from intercept_protocol.messages import AddRegion, ChangeRegions, MapVma, MapVmas, RemoveRegion, UnmapVma
from intercept_protocol.outcomes import Access, allows, spelled

from ._exchange import Exchange, Progress, Reply
from ._page_runs import PageRun, PageRuns
from ._vmm_requests import NewRegion

_NEVER_ADDED: Final = (Progress.REFUSED, Progress.WITHDRAWN)


class OwnRegions:
    """What a VMM lets its guest reach: the regions that the daemon has, or may have. Thread-safe.

    `BlockingVmm.regions` and `TrioVmm.regions` keep up with their connection by themselves, whichever method
    sends the request. Only a VMM that serves its hypervisor connection in another process than its main one
    makes a list there, and keeps it up with the other methods.
    """

    def __init__(self) -> None:
        self._regions = PageRuns()
        self._changes: list[_Change] = []
        """What is being changed, or was when the connection broke. The old regions stay in `_regions`."""
        self._vmas = PageRuns()
        self._lock = threading.Lock()

    def add(self, gfns: GfnRange, uaddrs: UaddrRange, *, writable: bool, executable: bool) -> None:
        """Let the daemon map `uaddrs` at `gfns` from now on; call it before the daemon is asked to add it.

        A region that overlaps one in the list stays out of it: the daemon has to refuse it (P-7).
        """
        with self._lock:
            self._regions.insert(_region(gfns, uaddrs, writable=writable, executable=executable))

    def remove(self, gfns: GfnRange) -> None:
        """Let the daemon map nothing there any more; call it when the daemon has removed the region."""
        with self._lock:
            self._regions.discard_at(gfns.start)

    def change(self, remove: Iterable[GfnRange], add: Iterable[NewRegion]) -> Callable[[bool], None]:
        """Let the daemon map the regions of `add` too from now on; call it before the daemon is asked for
        the change. Call what it returns when the daemon has answered: with True if the change was made, or
        False if it was refused."""
        change = _Change(
            [gfns.start for gfns in remove],
            [
                _region(each.gfns, each.uaddrs, writable=each.writable, executable=each.executable)
                for each in add
            ],
        )
        self._changing(change, Progress.IN_FLIGHT)
        return lambda made: self._changing(change, Progress.ANSWERED if made else Progress.REFUSED)

    def map_vma(self, uaddrs: UaddrRange, start_pfn: int) -> None:
        """Let the daemon say that `uaddrs` are the host pages from `start_pfn` on; call it before declaring
        that to the daemon."""
        with self._lock:
            self._vmas.insert(_vma(uaddrs, start_pfn))

    def unmap_vma(self, uaddrs: UaddrRange) -> None:
        """No host page is at `uaddrs` any more; call it when the daemon has answered that declaration."""
        with self._lock:
            self._vmas.carve(uaddrs)

    def require(self, gfns: GfnRange, uaddrs: UaddrRange, access: Access, start_pfn: int | None) -> None:
        """Raise `WireError` EPERM unless a daemon may map this.

        One region has to cover `gfns`, with these `uaddrs` and at least these rights. Unless `start_pfn` is
        None, the VMM has to have declared the host pages from there on for `uaddrs`. Both ranges have as many
        pages.
        """
        with self._lock:
            objection = self._to_region(gfns, uaddrs, access)
            if objection is None and start_pfn is not None:
                objection = self._to_pfn(uaddrs, start_pfn)
        if objection is not None:
            raise WireError(
                errno.EPERM,
                f"map_gpa of gfns {gfns} to uaddrs {uaddrs} with {spelled(access)}: {objection}",
            )

    def follow(self, exchange: Exchange[Reply]) -> Exchange[Reply]:
        """Keep up with a request of the `vmm` connection from before it is sent until it is answered.

        A region counts from before its request is sent, because the daemon may map it before it answers, and
        until the daemon has said that it was not added, or that it was removed. So one whose answer is
        outstanding, or will never come, counts. The same goes for VMAs. Returns the `exchange`.
        """
        exchange.on_progress = self._effect(exchange.call)
        return exchange

    def _effect(self, call: object) -> Callable[[Progress], None] | None:
        """What the progress of a request does to the lists. Nothing for ranges that are none: the daemon has
        to refuse them (P-4)."""
        try:
            match call:
                case AddRegion():
                    region = _asked(call)
                    return lambda progress: self._added(self._regions, [region], progress)
                case RemoveRegion(start_gfn=start, page_count=count):
                    gfns = GfnRange.of(start, count)
                    return lambda progress: self._removed(lambda: self.remove(gfns), progress)
                case ChangeRegions(remove=removed, add=added):
                    change = _Change([each.start_gfn for each in removed], [_asked(each) for each in added])
                    return lambda progress: self._changing(change, progress)
                case MapVma(start_uaddr=start, page_count=count):
                    vma = _vma(UaddrRange.of_pages(start, count), call.start_pfn)
                    return lambda progress: self._added(self._vmas, [vma], progress)
                case MapVmas(vmas=declared):
                    vmas = [
                        _vma(UaddrRange.of_pages(each.start_uaddr, each.page_count), each.start_pfn)
                        for each in declared
                    ]
                    return lambda progress: self._added(self._vmas, vmas, progress)
                case UnmapVma(start_uaddr=start, page_count=count):
                    uaddrs = UaddrRange.of_pages(start, count)
                    return lambda progress: self._removed(lambda: self.unmap_vma(uaddrs), progress)
        except RangeError:
            pass
        return None

    def _added(self, runs: PageRuns, added: Sequence[PageRun], progress: Progress) -> None:
        with self._lock:
            for run in added:
                if progress is Progress.IN_FLIGHT:
                    runs.insert(run)
                elif progress in _NEVER_ADDED:
                    runs.discard(run)

    def _changing(self, change: _Change, progress: Progress) -> None:
        """Both its old and its new regions count until it is answered. If it never is, they go on."""
        with self._lock:
            if progress is Progress.IN_FLIGHT:
                self._changes.append(change)
            elif progress is not Progress.LOST and change in self._changes:
                self._changes.remove(change)
            if progress is Progress.ANSWERED:
                for start in change.remove:
                    self._regions.discard_at(start)
                for run in change.add:
                    self._regions.insert(run)

    @staticmethod
    def _removed(remove: Callable[[], None], progress: Progress) -> None:
        if progress is Progress.ANSWERED:
            remove()

    def _to_region(self, gfns: GfnRange, uaddrs: UaddrRange, access: Access) -> str | None:
        """What speaks against it; the lock is held."""
        objection = _to_run(self._regions, gfns, uaddrs, access)
        if objection is not None and any(
            _to_run(change.coming, gfns, uaddrs, access) is None for change in self._changes
        ):
            return None
        return objection

    def _to_pfn(self, uaddrs: UaddrRange, start_pfn: int) -> str | None:
        """Likewise. Several VMAs will do, if their host pages are contiguous."""
        page = uaddrs.start
        while page < uaddrs.end:
            pfn, vma = start_pfn + page - uaddrs.start, self._vmas.find(page)
            if vma is None or vma.page_behind(page) != pfn:
                return f"pfn {pfn:#x} is not declared for uaddr {page << PAGE_SHIFT:#x}"
            page = vma.pages.end
        return None


class _Change:
    """A change of regions: where those begin that it removes, and those that it adds."""

    def __init__(self, remove: Sequence[int], add: Sequence[PageRun]) -> None:
        self.remove = remove
        self.add = add
        self.coming = PageRuns()
        for run in add:
            self.coming.insert(run)


def _to_run(regions: PageRuns, gfns: GfnRange, uaddrs: UaddrRange, access: Access) -> str | None:
    """What speaks against a map into one of these regions."""
    region = regions.find(gfns.start)
    if region is None:
        return f"no region of this VMM has gfn {gfns.start:#x}"
    if not region.pages.covers(gfns):
        return f"the region ends at gfn {region.pages.end:#x}"
    if (page := region.page_behind(gfns.start)) != uaddrs.start:
        return f"the region has uaddr {page << PAGE_SHIFT:#x} at gfn {gfns.start:#x}"
    if not allows(region.access, access):
        return f"the region has {spelled(region.access)}"
    return None


def _asked(call: AddRegion) -> PageRun:
    """Raises `RangeError` for ranges that are none."""
    gfns = GfnRange.of(call.start_gfn, call.page_count)
    uaddrs = UaddrRange.of_pages(call.start_uaddr, call.page_count)
    return _region(gfns, uaddrs, writable=call.writable, executable=call.executable)


def _region(gfns: GfnRange, uaddrs: UaddrRange, *, writable: bool, executable: bool) -> PageRun:
    rights = Access.READ
    if writable:
        rights |= Access.WRITE
    if executable:
        rights |= Access.EXECUTE
    return PageRun(gfns, uaddrs.start, rights)


def _vma(uaddrs: UaddrRange, start_pfn: int) -> PageRun:
    return PageRun(uaddrs, start_pfn, Access.NONE)
