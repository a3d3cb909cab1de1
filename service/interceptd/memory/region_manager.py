"""The region manager: one partition's regions, and the lock around changing them or what is mapped from them.

Owns the region list, the lock, and the order of each change: what is marked stale, unlinked, mapped or
revoked before what. The lock serialises everything that changes the list, the guest's mappings or the SLAT;
looking up is one synchronous step and takes no lock. It is never held across `resolve`, a stream or a
channel: under it only the hypervisor is awaited, shielded from cancellation, because the hypervisor bounds
its own calls and nobody may see a half-made change.

Must not know address spaces, connections or intercept messages, nor how a mapping is made.
"""

from __future__ import annotations

import errno
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice

import structlog
import trio

from intercept_protocol.addresses import GfnRange, UaddrRange
from intercept_protocol.elements import about_element
from intercept_protocol.errors import WireError
from intercept_protocol.events import AnyFact
from intercept_protocol.messages import MmioGranularity, RegionKind
from intercept_protocol.outcomes import Access, Answer, allows
from interceptd.hypervisor import HypervisorError, MemoryChanging
from interceptd.hypervisor.slat import SoftwareSlat
from interceptd.ledger.journal import Journal
from interceptd.ledger.records import Dangling
from interceptd.memory import region_facts
from interceptd.memory.attempt import Attempt, Busy, Whole, attempt_at, attempt_over, unpopulated
from interceptd.memory.guest_mappings import GuestMappings, Revocation
from interceptd.memory.mapping_change import MappingChange, Refused
from interceptd.memory.region import Region, RegionState
from interceptd.memory.region_change import RegionChange
from interceptd.memory.region_list import RegionList
from interceptd.mmu_notifier import Batch, MmuNotifier, Window
from interceptd.pages.mapping import Extent, Mapping
from interceptd.quota import Quota
from interceptd.scheduling.time_share import give_way_shielded
from interceptd.telemetry.event_bus import Publisher
from interceptd.telemetry.trace import Trace

log = structlog.get_logger()

EVENTS_PER_PART = 16
"""Events that are published before the time is looked at."""
_STATE_ANSWERS = {RegionState.POPULATING: Answer.CONTENDED, RegionState.DANGLING: Answer.UNBACKED}
"""The answers to a fault in a region that is not live."""


class RegionManager:
    """See the module. `quota` counts the regions of the uid. `mmio_granularity` may be set at any time."""

    def __init__(
        self,
        *,
        mappings: GuestMappings,
        notifier: MmuNotifier,
        region_limit: Callable[[], int],
        quota: Quota,
        mmio_granularity: MmioGranularity,
        event_bus: Publisher,
        journal: Journal | None = None,
    ) -> None:
        self.mmio_granularity = mmio_granularity
        self._journal = journal
        self._event_bus = event_bus
        self._mappings = mappings
        self._notifier = notifier
        self._quota = quota
        self._regions = RegionList(region_limit)
        self.trace: Trace | None = None
        """Told in the step that makes it true; subscribers hear of a region when its change is complete."""
        self._lock = mappings.lock

    # ------------------------------------------------ looking up: synchronous, no lock

    @property
    def busy(self) -> bool:
        """Whether the lock is held: a commit would have to wait."""
        return self._lock.locked()

    @property
    def quiet(self) -> bool:
        """Whether nobody changes or invalidates anything: what a fault is to map can be decided, and asked
        for, without an attempt, because nothing can come between."""
        return self._notifier.quiet and not self._lock.locked()

    @property
    def region_count(self) -> int:
        return len(self._regions)

    @property
    def mapping_count(self) -> int:
        return self._mappings.mapping_count

    def first_regions(self, count: int, start_gfn: int = 0) -> list[Region]:
        """Up to `count` regions that start at `start_gfn` or behind it, in the order of their gfns."""
        return list(islice(self._regions.starting_from(start_gfn), count))

    def first_mappings(self, count: int, start_gfn: int = 0) -> list[Mapping]:
        """The same of what is mapped, or is being mapped right now."""
        return self._mappings.starting_from(start_gfn, count)

    def lookup(self, gfn: int, access: Access) -> Mapping | Answer | Busy | Region:
        """Classify an access to `gfn`, atomically.

        A `Mapping` serves the access already; an `Answer` decides it; `Busy` must be waited for; in a
        `Region` the page must be resolved, in an attempt that `begin` makes.
        """
        mapping = self._mappings.find(gfn)
        if isinstance(mapping, trio.Event):
            return Busy(mapping, Answer.CONTENDED)
        if mapping is not None and allows(mapping.access, access):
            batch = self._notifier.invalidation_of(gfn - mapping.start + mapping.start_uaddr_page)
            return mapping if batch is None else Busy(batch.done, Answer.INVALIDATING)
        region = self._regions.find(gfn)
        if region is None:
            return Answer.NO_REGION
        if not allows(region.access, access):
            return Answer.PERMISSION
        return _STATE_ANSWERS.get(region.state, region)

    def begin(self, region: Region, gfn: int, access: Access) -> Busy | Attempt:
        """Begin the optimistic section in which the page is resolved, in the same step as its `lookup`.

        The caller resolves an `Attempt`, commits it and, whatever happens, finishes it.
        """
        return attempt_at(self._notifier, region, gfn, access, self.mmio_granularity)

    def begin_whole(self, region: Region) -> Attempt:
        """An attempt over all of a pinned region; EFAULT if some of it is being invalidated."""
        return attempt_over(self._notifier, region)

    def finish(self, attempt: Attempt) -> None:
        """End the optimistic section; every attempt is finished, however it went."""
        self._notifier.close_window(attempt.window)

    def window(self, region: Region, gfn: int) -> UaddrRange:
        """All that a fault on `gfn` may map, while it is `quiet`."""
        return region.uaddrs_of(region.window(gfn, self.mmio_granularity))

    def learn_in_windows(self, forget: Callable[[UaddrRange], None]) -> None:
        """See `MmuNotifier.learn_in_windows`."""
        self._notifier.learn_in_windows(forget)

    def open_look(self, region: Region, page: int) -> Window:
        """Begin to look up what backs the region around `page`, in the step in which an attempt began there.

        An attempt of its own, because what is learned of the whole region outlives the attempt.
        """
        uaddrs = self._notifier.cut_back(region.uaddrs, page)
        return self._notifier.open_window(uaddrs, is_attempt=False)

    def close_look(self, look: Window) -> None:
        """End it; every look is closed."""
        self._notifier.close_window(look)

    # ------------------------------------------------ changing: under the lock

    async def commit(
        self, attempt: Attempt, extents: Iterable[Extent], deadline: float = math.inf
    ) -> Answer | None:
        """Map what the attempt resolved; None if it went stale meanwhile, and nothing was decided.

        Only the gaps are mapped, because another VP may have mapped parts. All or nothing: a refusal undoes
        what this call mapped and nothing else, and is the answer HYPERVISOR_ERROR. (What had fewer rights and
        was to get more is left unmapped then, and faults again.)

        CONTENDED if the VMM is changing its memory, so that nothing could be decided.

        The deadline holds between the calls, though none is broken off: beyond it the rest is left
        for another fault, and what is mapped stays, because it is right in itself. A VMM that answers each of
        many calls just in time would else hold its VP up for as long as it likes (I4).
        """
        async with self._lock:
            if attempt.stale:
                return None
            try:
                made = await self._mappings.map_gaps(
                    attempt.region, attempt.wanted(extents), deadline, lambda: not attempt.stale
                )
            except MemoryChanging:
                return Answer.CONTENDED
            except HypervisorError:
                return Answer.HYPERVISOR_ERROR
            if not made:
                return Answer.ALREADY_MAPPED
            mapping = self._mappings.find(attempt.gfn)
            served = isinstance(mapping, Mapping) and allows(mapping.access, attempt.access)
            return Answer.MAPPED if served else None

    async def map_free(self, region: Region, mapping: Mapping) -> Answer | None:
        """`commit` while it is `quiet`, in the step in which what backs the mapping was found; None if
        something is mapped there. It waits for no lock: nobody holds it, and nobody can come between."""
        try:
            return Answer.MAPPED if await self._mappings.map_free(region, mapping) else None
        except MemoryChanging:
            return Answer.CONTENDED
        except HypervisorError:
            return Answer.HYPERVISOR_ERROR

    async def add(self, region: Region) -> None:
        """Insert a region; a movable one is mapped NO_ACCESS, so its first touch is a GPA_INTERCEPT.

        Insert comes first: a fault in between waits for the map instead of being told there is no region.
        """
        async with self._lock:
            with self._quota.acquired():
                self._regions.add(region)
                self._note_added(region)
            if region.kind is RegionKind.MOVABLE:
                try:
                    await self._mappings.map_no_access([(region, region.gfns)])
                except HypervisorError as error:
                    self._unlink(region)
                    raise WireError(error.number, f"region {region.gfns}: {error}") from error
            self._event_bus.publish(region_facts.added(region))

    async def remove(self, region: Region) -> None:
        """Unlink, make stale and unmap under one hold of the lock: the gfns are free for another region only
        when nothing of this one is left to unmap."""
        async with self._lock:
            await self._remove([region])

    async def remove_exactly(self, gfns: GfnRange, uaddrs: UaddrRange) -> None:
        """Remove the region with just these ranges; ENOENT or EINVAL if there is none."""
        async with self._lock:
            await self._remove([self._regions.exactly(gfns, uaddrs)])

    async def change(
        self,
        remove: Sequence[tuple[GfnRange, UaddrRange]],
        add: Sequence[Region],
        wholes: Sequence[Whole] = (),
    ) -> None:
        """Replace the regions that have just the ranges of `remove` by those of `add`, of which `wholes` has
        the pinned ones. All or nothing, and nobody sees anything between.

        Raises `WireError` as `remove_exactly` and `add` do, about the element, and EFAULT about a pinned
        region. What old and new regions have in common stays mapped. Faults on the rest wait: first it is
        taken away, then the regions are exchanged in one step, then what must be mapped at once is mapped. If
        the hypervisor refuses that, the old regions are put back; if they cannot be, the partition is lost.
        What `wholes` hold is freed. After the lock is released nothing waits, see `FaultHandler.populate`.
        """
        async with self._lock:
            change = self._checked(remove, add, wholes)
            mapping_change = MappingChange(self._mappings, change)
            try:
                with self._mappings.changing(change.changing):
                    with self._quota.reserved(max(0, len(change.new) - len(change.old))):
                        await mapping_change.take_away()
                    self._exchange(change.old, change.new)
                    try:
                        await mapping_change.make(wholes)
                    except Refused as refused:
                        await mapping_change.unmake()
                        self._exchange(change.new, change.old)
                        await mapping_change.put_back()
                        with about_element("add", add.index(refused.region)):
                            raise refused.error from refused
            finally:
                await mapping_change.free()
                for whole in wholes:
                    await whole.extents.free()
            await self._publish(region_facts.removed, change.old)
            await self._publish(region_facts.added, change.new)

    async def run(self) -> None:
        """The region manager task: serve invalidations until cancelled."""
        while True:
            await self._notifier.wait_rung()
            await trio.lowlevel.checkpoint()  # what is announced in this round of the event loop goes along
            await self.serve_pending()

    async def serve_pending(self) -> None:
        """Take away what is pending, and say so. The set is taken under the lock: one pass serves all."""
        async with self._lock:
            batch = self._notifier.take()
            going = self._mappings.revocation()
            for uaddrs in batch.pieces:
                for region in self._regions.behind(uaddrs):
                    await self._invalidate(region, uaddrs, going, exact=not batch.collapsed)
                    await give_way_shielded()
                await give_way_shielded()
            await going.finish()
            self._notifier.served(batch)

    async def wait_served(self, batch: Batch) -> None:
        """Block until no SLAT entry is left that was made from the batch's frames."""
        await self.serve_now()
        if not batch.done.is_set():
            await batch.done.wait()

    async def serve_now(self) -> None:
        """Make the pass here if the lock is free, which spares two switches of tasks (15 us), else have the
        region manager's task make it. It waits for nobody but the hypervisor, and is not broken off."""
        if self._lock.locked():
            self._notifier.ring()
        else:
            await self.serve_pending()

    async def close(self) -> None:
        """Unmap everything and forget the regions: the end of the partition (I6)."""
        async with self._lock:
            while regions := self.first_regions(self._mappings.pieces_per_call):
                await self._remove(regions)

    async def discard(self) -> None:
        """The partition has ended: forget what could not be removed, which no longer counts for its uid."""
        while (region := next(iter(self._regions), None)) is not None:
            self._unlink(region)
            await give_way_shielded()
        await self._mappings.discard()

    # ------------------------------------------------ taking over from a predecessor

    def take_over(self, region: Region) -> None:
        """Have a region, whatever the limits are now."""
        self._regions.link(region)
        self._quota.add(1)

    async def take_over_mapping(self, entry: Mapping) -> list[GfnRange]:
        """Record an entry of the SLAT as far as a region explains it; returns the rest, which must go."""
        strays: list[GfnRange] = []
        at = entry.start
        for region in self._over(entry.gfns):
            part = region.gfns.clip(entry.gfns)
            assert part is not None, "it overlaps"
            if at < part.start:
                strays.append(GfnRange(start=at, end=part.start))
            at = part.end
            mapping = entry.slice(part.start, part.end)
            if not region.explains(mapping):
                strays.append(part)
            elif mapping.access:
                self._mappings.take_over(region, mapping)
            await give_way_shielded()
        if at < entry.end:
            strays.append(GfnRange(start=at, end=entry.end))
        return strays

    async def doubt(self, gfns: GfnRange) -> None:
        """Nobody knows what the guest has there, until it is unmapped."""
        for region in self._over(gfns):
            part = region.gfns.clip(gfns)
            assert part is not None, "it overlaps"
            self._mappings.doubt(region, part)
            await give_way_shielded()

    async def unmap_unrecorded(self, strays: Sequence[GfnRange]) -> None:
        """Unmap what the guest may have, and no region. Raises `HypervisorError`. Holds the lock, because an
        invalidation may be served meanwhile: the journal tells of one call of the hypervisor at a time."""
        async with self._lock:
            await self._mappings.unmap_unrecorded(strays)

    async def close_gaps(self, table: SoftwareSlat) -> None:
        """Map NO_ACCESS what a movable region has no entry for in the SLAT. Raises `HypervisorError`."""
        async with self._lock:
            for region in self._regions:
                if region.kind is RegionKind.MOVABLE:
                    for gaps in table.gaps(region.gfns):
                        await self._mappings.map_no_access([(region, gfns) for gfns in gaps])
                        await give_way_shielded()
                await give_way_shielded()

    def _over(self, gfns: GfnRange) -> Iterator[Region]:
        """The regions that overlap `gfns`, in order."""
        first = self._regions.find(gfns.start)
        if first is not None:
            yield first
        yield from self._regions.between(gfns.start + 1, gfns.end)

    # ------------------------------------------------ helpers; the lock is held

    async def _invalidate(
        self, region: Region, uaddrs: UaddrRange, going: Revocation, *, exact: bool
    ) -> None:
        """A pinned region is dangling only if it is known to be hit; otherwise its pages are mapped again."""
        assert self._lock.is_mine
        clipped = region.uaddrs.clip(uaddrs)
        assert clipped is not None, "the list answers with regions that overlap"
        gfns = region.gfns_of(clipped)
        if exact and region.kind is RegionKind.PINNED and region.state is RegionState.LIVE:
            region.state = RegionState.DANGLING
            if self._journal is not None:
                self._journal.append(Dangling(region.gfns.start))
            log.warning(
                "pinned_region_dangling",
                start_gfn=region.gfns.start,
                page_count=region.gfns.page_count,
                invalidated=str(gfns),
            )
            self._event_bus.publish(region_facts.dangling(region))
        await going.revoke(region, gfns)

    async def _remove(self, regions: Sequence[Region]) -> None:
        assert self._lock.is_mine
        for region in regions:
            self._unlink(region)
            self._notifier.mark_stale(region.uaddrs)
        going = self._mappings.revocation()
        for region in regions:
            await going.unmap_all(region, region.gfns)
            await give_way_shielded()
        await going.finish()
        await self._publish(region_facts.removed, regions)

    def _checked(
        self, remove: Sequence[tuple[GfnRange, UaddrRange]], add: Sequence[Region], wholes: Sequence[Whole]
    ) -> RegionChange:
        """The plan of a change that is possible; raises what speaks against it."""
        old: dict[int, Region] = {}
        for index, (gfns, uaddrs) in enumerate(remove):
            with about_element("remove", index):
                if gfns.start in old:
                    raise WireError(errno.ENOENT, f"region {gfns} is removed twice", start_gfn=gfns.start)
                old[gfns.start] = self._regions.exactly(gfns, uaddrs)
        self._regions.require_room(add, set(old.values()))
        change = RegionChange(old.values(), add)
        self._mappings.require_room_to_cut(gfns for _, gfns in change.going)
        for whole in wholes:
            if whole.attempt.stale:
                with about_element("add", add.index(whole.attempt.region)):
                    raise unpopulated(whole.attempt.region, "its memory was invalidated meanwhile")
        return change

    def _exchange(self, old: Iterable[Region], new: Iterable[Region]) -> None:
        """One step, after which attempts in the old regions come to nothing."""
        gone = list(old)
        for region in gone:
            self._unlink(region)
        self._notifier.mark_all_stale(region.uaddrs for region in gone)
        for region in new:
            self._regions.link(region)
            self._quota.add(1)
            self._note_added(region)

    async def _publish(self, fact_of: Callable[[Region], AnyFact], regions: Sequence[Region]) -> None:
        """An event about each region, and let others run meanwhile: each is offered to every subscriber."""
        for first in range(0, len(regions), EVENTS_PER_PART):
            self._event_bus.publish_each(fact_of, regions[first : first + EVENTS_PER_PART])
            await give_way_shielded()

    def _unlink(self, region: Region) -> None:
        self._regions.remove(region)
        self._quota.release()
        if self.trace is not None:
            self.trace.region_removed(region_facts.removed(region))

    def _note_added(self, region: Region) -> None:
        if self.trace is not None:
            self.trace.region_added(region_facts.added(region))
