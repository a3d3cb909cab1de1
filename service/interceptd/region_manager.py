"""The region manager: one partition's regions, what is mapped from them, and the lock around changing either.

Owns the region list, the record of mappings and the lock. The lock serialises everything that changes those
or the SLAT; looking up is one synchronous step and takes no lock. It is never held across `resolve`, a stream
or a channel: under it only the hypervisor is awaited, shielded from cancellation, because the hypervisor
bounds its own calls and a half-made change is what nobody may see.

Must not know address spaces, connections or intercept messages.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice

import structlog
import trio

from intercept_protocol.addresses import GfnRange, UaddrRange
from intercept_protocol.errors import WireError
from intercept_protocol.events import PinnedRegionDangling, RegionAdded, RegionRemoved
from intercept_protocol.messages import MmioGranularity, RegionKind
from intercept_protocol.outcomes import Access, Answer, allows
from interceptd.attempt import Attempt, Obstacle
from interceptd.hypervisor import Hypervisor, HypervisorError, PartitionLost
from interceptd.journal import Publisher
from interceptd.mapping import Extent, Mapping, insert_joined
from interceptd.mmu_notifier import MmuNotifier
from interceptd.range_map import RangeMap
from interceptd.region import Region, RegionState
from interceptd.region_list import RegionList

log = structlog.get_logger()

A_TURN = 32
"""Regions, or mappings, that a long walk under the lock passes before it lets other tasks run: a partition
with a million of them must not stop the others, and each takes up to 0.1 ms. Whoever wants this partition's
lock waits all the same."""

_STATE_ANSWERS = {RegionState.POPULATING: Answer.CONTENDED, RegionState.DANGLING: Answer.UNBACKED}
"""What a fault is told in a region that is not live."""


@dataclass(frozen=True, slots=True)
class _Change:
    """The gfns that the lock's holder is mapping or unmapping right now."""

    gfns: GfnRange
    over: trio.Event


class RegionManager:
    """See the module. `mmio_granularity` is policy and may be set at any time."""

    def __init__(
        self,
        *,
        hypervisor: Hypervisor,
        notifier: MmuNotifier,
        region_limit: Callable[[], int],
        mapping_limit: Callable[[], int],
        require_room: Callable[[], None],
        mmio_granularity: MmioGranularity,
        journal: Publisher,
    ) -> None:
        self.mmio_granularity = mmio_granularity
        self._journal = journal
        self._hypervisor = hypervisor
        self._notifier = notifier
        self._mapping_limit = mapping_limit
        self._require_room = require_room
        self._regions = RegionList(region_limit)
        self._mappings: RangeMap[Mapping] = RangeMap()
        self._lock = trio.Lock()
        self._change: _Change | None = None  # one slot: only the lock's holder changes anything

    # ------------------------------------------------ looking up: synchronous, no lock

    @property
    def busy(self) -> bool:
        """Whether the lock is held: a commit would have to wait."""
        return self._lock.locked()

    @property
    def region_count(self) -> int:
        return len(self._regions)

    def first_regions(self, count: int) -> list[tuple[Region, int]]:
        """Up to `count` regions in the order of their gfns, each with its number of mapped gfns."""
        return [(region, self._mapped_gfns(region.gfns)) for region in islice(self._regions, count)]

    def look(self, gfn: int, access: Access) -> Mapping | Answer | Obstacle | Region:
        """What there is to an access to `gfn`, seen in one whole state.

        A `Mapping` serves the access already; an `Answer` is decided; an `Obstacle` is to be waited for; of
        the `Region` that covers it the page must be resolved.
        """
        if self._change is not None and gfn in self._change.gfns:
            return Obstacle(self._change.over, Answer.CONTENDED)
        mapping = self._mappings.find(gfn)
        if mapping is not None and allows(mapping.access, access):
            going = self._notifier.going(gfn - mapping.start + mapping.start_uaddr_page)
            return mapping if going is None else Obstacle(going.done, Answer.INVALIDATING)
        region = self._regions.find(gfn)
        if region is None:
            return Answer.NO_REGION
        if access not in region.access:
            return Answer.PERMISSION
        return _STATE_ANSWERS.get(region.state, region)

    def begin(self, gfn: int, access: Access) -> Mapping | Answer | Obstacle | Attempt:
        """Like `look`, and where the page must be resolved, the optimistic section for that is begun.

        An `Attempt` is to be resolved, committed and, come what may, finished.
        """
        step = self.look(gfn, access)
        return self._optimistic_section(step, gfn, access) if isinstance(step, Region) else step

    def begin_whole(self, region: Region) -> Attempt:
        """An attempt over all of a pinned region; EFAULT if some of it is being invalidated."""
        if self._notifier.is_invalidating(region.uaddrs):
            raise WireError(
                errno.EFAULT, f"pinned region {region.gfns} cannot be populated: it is being invalidated"
            )
        window = self._notifier.open_window(region.uaddrs)
        return Attempt(region, region.gfns.start, Access.READ, window)

    def finish(self, attempt: Attempt) -> None:
        """End the optimistic section; every attempt is finished, however it went."""
        self._notifier.close_window(attempt.window)

    # ------------------------------------------------ changing: under the lock

    async def commit(self, attempt: Attempt, extents: Iterable[Extent]) -> Answer | None:
        """Map what the attempt resolved; None if it went stale meanwhile, and nothing was decided.

        Only the gaps are mapped, because another VP may have mapped parts. All or nothing: a refusal undoes
        what this call mapped and nothing else, and is the answer HYPERVISOR_ERROR. (What had fewer rights and
        was to get more is left unmapped then, and faults again.)

        The caller's deadline holds between the calls, though none is broken off: beyond it the rest is left
        for another fault, and what is mapped stays, because it is right in itself. A VMM that answers each of
        many calls just in time would else hold its VP up for as long as it likes (I4).
        """
        deadline = trio.current_effective_deadline()
        async with self._lock:
            if attempt.stale:
                return None
            made: list[Mapping] = []
            with trio.CancelScope(shield=True):
                for part in self._in_parts(attempt, extents):
                    for gap in self._gaps(part):
                        try:
                            await self._map(attempt.region, gap)
                        except HypervisorError as error:
                            log.warning("map_refused", region=str(attempt.region.gfns), error=str(error))
                            await self._undo(attempt.region, made, deadline)
                            return Answer.HYPERVISOR_ERROR
                        made.append(gap)
                        if trio.current_time() > deadline:
                            return self._served_so_far(attempt)
                        await _let_others_run(len(made))
            return Answer.MAPPED if made else Answer.ALREADY_MAPPED

    async def add(self, region: Region) -> None:
        """Insert a region; a movable one is mapped NO_ACCESS, so its first touch is a GPA_INTERCEPT.

        Insert comes first: a fault in between waits for the map instead of being told there is no region.
        """
        async with self._lock:
            self._require_room()
            self._regions.add(region)
            if region.kind is RegionKind.MOVABLE:
                with trio.CancelScope(shield=True), self._changing(region.gfns):
                    try:
                        await self._hypervisor.map_gpa(region.no_access(region.gfns))
                    except HypervisorError as error:
                        self._regions.remove(region)
                        raise WireError(error.number, f"region {region.gfns}: {error}") from error
            self._journal.publish(_added(region))

    async def remove(self, region: Region) -> None:
        """Unlink, make stale and unmap under one hold of the lock: the gfns are free for another region only
        when nothing of this one is left to unmap."""
        async with self._lock:
            await self._remove(region)

    async def remove_exactly(self, gfns: GfnRange, uaddrs: UaddrRange) -> None:
        """Remove the region with just these ranges; ENOENT or EINVAL if there is none."""
        async with self._lock:
            await self._remove(self._regions.exactly(gfns, uaddrs))

    async def run(self) -> None:
        """The region manager task: serve invalidations until cancelled."""
        while True:
            await self._notifier.wait_rung()
            await self.serve_pending()

    async def serve_pending(self) -> None:
        """Take away what is pending, and say so. The set is taken under the lock: one pass serves all."""
        async with self._lock:
            batch = self._notifier.take()
            with trio.CancelScope(shield=True):
                touched = (
                    (region, uaddrs) for uaddrs in batch.pieces for region in self._regions.behind(uaddrs)
                )
                for passed, (region, uaddrs) in enumerate(touched, start=1):
                    await self._invalidate(region, uaddrs, exact=not batch.collapsed)
                    await _let_others_run(passed)
            self._notifier.served(batch)

    async def close(self) -> None:
        """Unmap everything and forget the regions: the end of the partition (I6)."""
        async with self._lock:
            with trio.CancelScope(shield=True):
                for passed, region in enumerate(list(self._regions), start=1):
                    await self._remove(region)
                    await _let_others_run(passed)

    # ------------------------------------------------ helpers; those that are async want the lock held

    def _optimistic_section(self, region: Region, gfn: int, access: Access) -> Obstacle | Attempt:
        gfns = region.window(gfn, self.mmio_granularity)
        faulting = region.uaddrs_of(GfnRange(gfn, gfn + 1))
        entry = self._notifier.open_at(faulting)
        if entry is not None:
            return Obstacle(entry.over, Answer.INVALIDATING)
        going = self._notifier.going(faulting.start)
        if going is not None:  # what is mapped now, the pass to come would take away again
            return Obstacle(going.done, Answer.INVALIDATING)
        uaddrs = self._notifier.cut_back(region.uaddrs_of(gfns), faulting.start)
        return Attempt(region, gfn, access, self._notifier.open_window(uaddrs))

    def _served_so_far(self, attempt: Attempt) -> Answer | None:
        mapping = self._mappings.find(attempt.gfn)
        return Answer.MAPPED if mapping is not None and allows(mapping.access, attempt.access) else None

    def _in_parts(self, attempt: Attempt, extents: Iterable[Extent]) -> Iterator[Mapping]:
        """What the extents are to map, cut so that few mappings are in the way of each part."""
        for extent in extents:
            assert attempt.window.uaddrs.covers(extent.uaddrs), "an address space answers within the window"
            wanted = attempt.region.mapping(extent)
            for gfns in self._parts(wanted.gfns):
                yield wanted.slice(gfns.start, gfns.end)

    @contextmanager
    def _changing(self, gfns: GfnRange) -> Iterator[None]:
        """Make faults on `gfns` wait while the hypervisor is being asked."""
        self._change = _Change(gfns, trio.Event())
        try:
            yield
        finally:
            self._change.over.set()
            self._change = None

    def _gaps(self, wanted: Mapping) -> list[Mapping]:
        """The parts of `wanted` that the guest does not have yet, with the rights that it is to have."""
        gaps = [wanted.slice(start, end) for start, end in self._mappings.gaps(wanted)]
        for held in self._mappings.clipped(wanted):
            part = wanted.slice(held.start, held.end)
            if not held.serves(part):
                gaps.append(part)
        return gaps

    async def _map(self, region: Region, mapping: Mapping) -> None:
        """Record first, then call: while the call is out nobody is told RESUME, and nobody loses track of it.

        What is recorded there already (the VMA was given more rights, unannounced) is taken away before.
        """
        if self._mappings.overlapping(mapping):
            await self._take_away(region, mapping.gfns)
        if len(self._mappings) >= (limit := self._mapping_limit()):
            raise HypervisorError(errno.ENOSPC, f"a partition may have {limit} mappings")
        with self._changing(mapping.gfns):
            self._mappings.insert(mapping)
            try:
                await self._hypervisor.map_gpa(mapping)
            except HypervisorError:
                self._mappings.carve(mapping)
                raise
            except Exception as error:  # a mistake of ours: who knows what the guest reaches now
                raise PartitionLost(f"mapping gfns {mapping.gfns} broke down: {error!r}") from error
            self._mappings.carve(mapping)
            insert_joined(self._mappings, mapping)

    async def _take_away(self, region: Region, gfns: GfnRange) -> None:
        """Leave the guest nothing that was mapped in `gfns` of the region: movable goes back to NO_ACCESS.

        May not fail: the frames will be somebody else's. Raises `PartitionLost` if the hypervisor refuses.
        """
        for part in self._parts(gfns):
            for run in _runs(self._mappings.clipped(part)):
                with self._changing(run):
                    with _no_refusal(run):
                        if region.kind is RegionKind.MOVABLE:
                            await self._hypervisor.map_gpa(region.no_access(run))
                        else:
                            await self._hypervisor.unmap_gpa(run)
                    self._mappings.carve(run)
            if part.end < gfns.end:
                await trio.lowlevel.checkpoint()

    async def _undo(self, region: Region, made: list[Mapping], deadline: float) -> None:
        for passed, mapping in enumerate(made, start=1):
            if trio.current_time() > deadline:
                return
            await self._take_away(region, mapping.gfns)
            await _let_others_run(passed)

    def _parts(self, gfns: GfnRange) -> Iterator[GfnRange]:
        """`gfns` cut so that few mappings begin in each part; the caller lets others run in between."""
        rest = gfns
        while rest.page_count:
            part = self._mappings.head(rest, A_TURN)
            yield GfnRange(part.start, part.end)
            rest = GfnRange(part.end, rest.end)

    async def _invalidate(self, region: Region, uaddrs: UaddrRange, *, exact: bool) -> None:
        """A pinned region is dangling only if it is known to be hit; otherwise its pages are mapped again."""
        clipped = region.uaddrs.clip(uaddrs)
        assert clipped is not None, "the list answers with regions that overlap"
        gfns = region.gfns_of(clipped)
        if exact and region.kind is RegionKind.PINNED and region.state is RegionState.LIVE:
            region.state = RegionState.DANGLING
            log.warning(
                "pinned_region_dangling",
                start_gfn=region.gfns.start,
                page_count=region.gfns.page_count,
                invalidated=str(gfns),
            )
            self._journal.publish(
                PinnedRegionDangling(
                    start_gfn=region.gfns.start,
                    page_count=region.gfns.page_count,
                    start_uaddr=region.uaddrs.start_uaddr,
                )
            )
        await self._take_away(region, gfns)

    async def _remove(self, region: Region) -> None:
        self._regions.remove(region)
        self._notifier.mark_stale(region.uaddrs)
        with trio.CancelScope(shield=True):
            for part in self._parts(region.gfns):
                movable = region.kind is RegionKind.MOVABLE  # whose NO_ACCESS entries go as well
                for run in [part] if movable else _runs(self._mappings.clipped(part)):
                    with self._changing(run):
                        with _no_refusal(run):
                            await self._hypervisor.unmap_gpa(run)
                        self._mappings.carve(run)
                if part.end < region.gfns.end:
                    await trio.lowlevel.checkpoint()
        self._journal.publish(
            RegionRemoved(
                start_gfn=region.gfns.start,
                page_count=region.gfns.page_count,
                start_uaddr=region.uaddrs.start_uaddr,
            )
        )

    def _mapped_gfns(self, gfns: GfnRange) -> int:
        return sum(mapping.end - mapping.start for mapping in self._mappings.clipped(gfns))


def _added(region: Region) -> RegionAdded:
    return RegionAdded(
        start_gfn=region.gfns.start,
        page_count=region.gfns.page_count,
        start_uaddr=region.uaddrs.start_uaddr,
        kind=region.kind,
        writable=bool(region.access & Access.WRITE),
        executable=bool(region.access & Access.EXECUTE),
    )


@contextmanager
def _no_refusal(gfns: GfnRange) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise PartitionLost(f"gfns {gfns} may still be reached by the guest: {error}") from error


async def _let_others_run(passed: int) -> None:
    """Once in `A_TURN`. No generator: one that an error leaves half-way is never closed."""
    if not passed % A_TURN:
        await trio.lowlevel.checkpoint()


def _runs(mappings: Iterable[Mapping]) -> list[GfnRange]:
    """Neighbouring mappings as one range each: they go in one call."""
    runs: list[GfnRange] = []
    for mapping in mappings:
        if runs and runs[-1].end == mapping.start:
            runs[-1] = GfnRange(runs[-1].start, mapping.end)
        else:
            runs.append(mapping.gfns)
    return runs
