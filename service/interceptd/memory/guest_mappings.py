"""What a guest was given: the record of its mappings, and the calls that keep the hypervisor's table in step.

Owns the record, what is being changed right now, the order of a change (recorded before the call, undone if
the call is refused), and the lock that every change needs. The region manager takes that lock, because its
own changes need it too. Must not know which regions exist, or what is being invalidated.
"""

from __future__ import annotations

import errno
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from itertools import chain, islice

import structlog
import trio

from intercept_protocol.addresses import GfnRange
from intercept_protocol.errors import WireError
from intercept_protocol.messages import RegionKind
from intercept_protocol.text import sentence
from interceptd.eager_lock import EagerLock
from interceptd.errors import PartitionLost
from interceptd.hypervisor import Hypervisor, HypervisorError, MemoryChanging, named
from interceptd.memory.long_lists import LongList
from interceptd.memory.region import Piece, Region
from interceptd.pages.counted_range_map import CountedRangeMap
from interceptd.pages.mapping import Mapping, insert_joined, join
from interceptd.quota import Quota
from interceptd.scheduling.time_share import give_way_shielded

log = structlog.get_logger()

MAPPINGS_PER_PART = 16
"""Mappings that are looked at together; those that continue each other are then revoked in one call."""


class _Change:
    """The gfns that the lock's holder is changing until the end of a `with` block. Blocks nest: calls on some
    of the gfns are changes within."""

    __slots__ = ("_mappings", "_over", "around", "gfns")

    def __init__(self, mappings: GuestMappings, gfns: Sequence[GfnRange]) -> None:
        self._mappings = mappings
        self._over: trio.Event | None = None
        self.gfns = gfns

    def __enter__(self) -> None:
        self.around: _Change | None = self._mappings._change
        self._mappings._change = self

    def __exit__(self, *_: object) -> None:
        self._mappings._change = self.around
        if self._over is not None:
            self._over.set()

    def __contains__(self, gfn: int) -> bool:
        return any(gfn in gfns for gfns in self.gfns)

    def over(self) -> trio.Event:
        """Set at the end; created by the first fault that waits for it."""
        if self._over is None:
            self._over = trio.Event()
        return self._over


class GuestMappings:
    """One partition's mappings, at most `limit()` of them; `quota` counts those of the uid. Reading is
    synchronous and needs no lock.
    """

    def __init__(self, hypervisor: Hypervisor, limit: Callable[[], int], quota: Quota) -> None:
        self._hypervisor = hypervisor
        self._limit = limit
        self._quota = quota
        self.lock = EagerLock()
        """A partition's region lock. Changing the mappings without it is an AssertionError."""
        self._record: CountedRangeMap[Mapping] = CountedRangeMap(quota)
        self._change: _Change | None = None
        """The innermost one. One slot: only the holder of the lock changes anything."""

    @property
    def may_block(self) -> bool:
        """Whether a change may wait for anybody."""
        return self._hypervisor.may_block

    @property
    def pieces_per_call(self) -> int:
        """How many pieces the hypervisor takes at once."""
        return self._hypervisor.pieces_per_call

    # ------------------------------------------------ looking

    def find(self, gfn: int) -> Mapping | trio.Event | None:
        """What is recorded of `gfn`; the end of its being mapped or unmapped, while that goes on."""
        change = self._change
        while change is not None:
            if gfn in change:
                return change.over()
            change = change.around
        return self._record.find(gfn)

    @property
    def mapping_count(self) -> int:
        return len(self._record)

    def some(self, gfns: GfnRange, count: int) -> list[Mapping]:
        """The first mappings in `gfns`, in order and cut to them: all, or `count` and perhaps one more."""
        return self._record.clipped(self._record.head(gfns, count))

    def starting_from(self, gfn: int, count: int) -> list[Mapping]:
        """Up to `count` mappings that start at `gfn` or behind it, in order."""
        return self._record.starting_from(gfn, count)

    async def all(self, gfns: GfnRange) -> LongList[Mapping]:
        """All mappings in `gfns`, cut to them. The lock is held: they do not change meanwhile."""
        assert self.lock.is_mine
        found: LongList[Mapping] = LongList()
        for part in self._parts(gfns):
            for mapping in self._record.clipped(part):
                found.append(mapping)
            if part.end < gfns.end:
                await give_way_shielded()
        return found

    async def count(self, gfns: GfnRange) -> int:
        """How many of `gfns` are mapped. The lock is held, as for `all`."""
        assert self.lock.is_mine
        count = 0
        for part in self._parts(gfns):
            count += sum(mapping.end - mapping.start for mapping in self._record.clipped(part))
            if part.end < gfns.end:
                await give_way_shielded()
        return count

    def require_room_to_cut(self, pieces: Iterable[GfnRange]) -> None:
        """Raise ENOSPC if taking away `pieces` would leave more mappings than there may be.

        One that is cut in two becomes two. Else changes that cut regions, and join them again, would cut
        what is mapped into ever more.
        """
        more = sum(map(self._is_inside_one, pieces))
        if more and len(self._record) + more > (limit := self._limit()):
            raise WireError(errno.ENOSPC, _too_many(limit), limit="mappings_per_partition")
        if more:
            self._quota.require(more)

    # ------------------------------------------------ changing: the lock is held, and nothing is broken off

    def changing(self, gfns: Sequence[GfnRange]) -> AbstractContextManager[None]:
        """Make faults on `gfns` wait until the end of a `with` block."""
        return _Change(self, gfns)

    async def map_gaps(
        self,
        region: Region,
        wanted: Iterable[Mapping],
        deadline: float,
        goes_on: Callable[[], bool] = lambda: True,
    ) -> int:
        """Give the guest those parts of `wanted` that it has not got; returns how many parts that took.

        Raises `HypervisorError` when one is refused, and undoes what this call mapped and nothing else.
        Beyond the deadline, or when it no longer `goes_on` after others ran, the rest is left, and what is
        mapped stays; so it does when the VMM is changing its memory (`MemoryChanging`).
        """
        assert self.lock.is_mine
        made: LongList[Mapping] = LongList()
        gaps = self._all_gaps(wanted)
        most = self._hypervisor.pieces_per_call
        asked: list[Mapping] = []
        try:
            while asked := list(islice(gaps, most)):
                if len(asked) > 1 and not self._has_room(len(asked)):  # one by one they may be joined
                    gaps, most = chain(asked, gaps), 1
                    continue
                if made:
                    await give_way_shielded()
                    if not goes_on():
                        break
                await self._map(region, asked)
                made.extend(asked)
                if trio.current_time() > deadline:
                    break
            return len(made)
        except MemoryChanging:
            raise
        except HypervisorError as error:
            log.warning("map_refused", region=str(region.gfns), error=str(error))
            made.extend(asked[: error.done])
            await self._undo(region, made, deadline)
            raise
        finally:
            await made.free()

    async def map_free(self, region: Region, mapping: Mapping) -> bool:
        """`map_gaps` of one piece of which nothing is mapped yet, while nobody holds the lock; False if
        something is in the way.

        The straight line of a first touch. If the hypervisor never blocks, it is one step without a
        checkpoint, so that there is nobody who would have to wait, or could see it half-made.
        """
        record = self._record
        if not self._has_room(1) or not insert_joined(record, mapping):
            return False
        region.mapped_gfns += mapping.end - mapping.start
        try:
            if self._hypervisor.may_block:
                async with self.lock:
                    with _Change(self, [mapping.gfns]):
                        await self._ask_to_map(region, [mapping])
            else:
                await self._ask_to_map(region, [mapping])
        except MemoryChanging:
            raise
        except HypervisorError as error:
            log.warning("map_refused", region=str(region.gfns), error=str(error))
            raise
        return True

    async def map_no_access(self, pieces: Sequence[Piece]) -> None:
        """NO_ACCESS over pieces of movable regions that nothing is mapped in. Raises `HypervisorError`, whose
        `done` counts the pieces."""
        assert self.lock.is_mine
        mappings = [region.no_access(gfns) for region, gfns in pieces]
        done = 0
        with self.changing([gfns for _, gfns in pieces]):
            while asked := mappings[done : done + self._hypervisor.pieces_per_call]:
                try:
                    await self._hypervisor.map_gpas(asked)
                except HypervisorError as error:
                    error.done += done
                    raise
                done += len(asked)
                await give_way_shielded()

    async def map_again(self, region: Region, taken: Iterable[Mapping]) -> None:
        """Give back what was taken away, whatever the limits are now. Raises `HypervisorError`."""
        assert self.lock.is_mine
        rest = iter(taken)
        while asked := list(islice(rest, self._hypervisor.pieces_per_call)):
            await self._map(region, asked, limited=False)
            await give_way_shielded()

    def revocation(self) -> Revocation:
        """Begin to take something away from the guest."""
        return Revocation(self)

    # ------------------------------------------------ taking over from a predecessor

    def take_over(self, region: Region, mapping: Mapping) -> None:
        """Record what the guest has, whatever the limits are now."""
        insert_joined(self._record, mapping)
        region.mapped_gfns += mapping.end - mapping.start

    def doubt(self, region: Region, gfns: GfnRange) -> None:
        """Record no longer what the guest may or may not have."""
        self._forget(region, gfns)

    async def unmap_unrecorded(self, ranges: Iterable[GfnRange]) -> None:
        """Unmap what is not in the record. Raises `HypervisorError`."""
        assert self.lock.is_mine
        rest = iter(ranges)
        while asked := list(islice(rest, self._hypervisor.pieces_per_call)):
            await self._hypervisor.unmap_gpas(asked)
            await give_way_shielded()

    async def discard(self) -> None:
        """Free the record of a partition that has ended, and let others run meanwhile."""
        while self._record.drop_some():
            await give_way_shielded()

    # ------------------------------------------------ helpers

    def _all_gaps(self, wanted: Iterable[Mapping]) -> Iterator[Mapping]:
        """The gaps of all that is wanted, cut so that few mappings are in the way of each part."""
        for mapping in wanted:
            if not self._record.touches(mapping):
                yield mapping
                continue
            for gfns in self._parts(mapping.gfns):
                yield from self._gaps(mapping.slice(gfns.start, gfns.end))

    def _gaps(self, wanted: Mapping) -> list[Mapping]:
        """The parts of `wanted` that the guest does not have yet, with the rights that it is to have."""
        gaps = [wanted.slice(start, end) for start, end in self._record.gaps(wanted)]
        for held in self._record.clipped(wanted):
            part = wanted.slice(held.start, held.end)
            if not held.serves(part):
                gaps.append(part)
        return gaps

    async def _map(self, region: Region, mappings: Sequence[Mapping], *, limited: bool = True) -> None:
        """Record first, then call: while the call is out nobody is told RESUME, and nobody loses track of it.

        What is recorded there already (the VMA was given more rights, unannounced) is taken away before.
        """
        if any(map(self._record.touches, mappings)):
            await self._take_back(region, mappings)
        if limited and not self._has_room(len(mappings)):
            raise self._no_room(len(mappings))
        gfns = [mapping.gfns for mapping in mappings]
        with self.changing(gfns):
            for mapping in mappings:
                self._record.insert(mapping)
                region.mapped_gfns += mapping.end - mapping.start
            await self._ask_to_map(region, mappings)
            for mapping in mappings:  # but for those that were joined with the one before
                if mapping is mappings[0] or self._record.find(mapping.start) is mapping:
                    join(self._record, mapping)

    async def _ask_to_map(self, region: Region, mappings: Sequence[Mapping]) -> None:
        """Ask for what is recorded already, and record no longer what is refused."""
        try:
            await self._hypervisor.map_gpas(mappings)
        except HypervisorError as error:
            for refused in mappings[error.done :]:
                self._forget(region, refused.gfns)
            raise
        except PartitionLost:
            raise
        except Exception as error:  # a mistake of ours: who knows what the guest reaches now
            log.exception("map_broke_down", region=str(region.gfns))
            gfns = [mapping.gfns for mapping in mappings]
            raise PartitionLost(f"mapping {named(gfns)} broke down: {sentence(error)}") from error

    async def _take_back(self, region: Region, mappings: Sequence[Mapping]) -> None:
        going = self.revocation()
        for mapping in mappings:
            await going.revoke(region, mapping.gfns)
        await going.finish()

    async def _undo(self, region: Region, made: Iterable[Mapping], deadline: float) -> None:
        going = self.revocation()
        for mapping in made:
            if trio.current_time() > deadline:
                break
            await going.revoke(region, mapping.gfns, exactly=True)
            await give_way_shielded()
        await going.finish()

    def _forget(self, region: Region, gfns: GfnRange) -> None:
        before = self._record.page_count
        self._record.carve(gfns)
        region.mapped_gfns -= before - self._record.page_count

    def _has_room(self, more: int) -> bool:
        """Whether the partition and its uid may have so many more mappings."""
        return len(self._record) + more <= self._limit() and self._quota.has_room(more)

    def _no_room(self, more: int) -> HypervisorError:
        if len(self._record) + more > (limit := self._limit()):
            return HypervisorError(errno.ENOSPC, _too_many(limit))
        return HypervisorError(errno.ENOSPC, self._quota.refusal(more).message)

    def _whole_piece(self, region: Region, gfns: GfnRange) -> GfnRange:
        """All of the mapping that `gfns` would cut in two: it goes where no other mapping may be made. Else
        invalidations would cut mappings into ever more. What goes too much faults again."""
        around = self._record.find(gfns.start)
        assert around is not None, "the caller asked `_is_inside_one`"
        whole = region.gfns.clip(around.gfns)  # neighbours that continue each other share a mapping
        assert whole is not None, "the mapping overlaps the region"
        return whole

    def _is_inside_one(self, gfns: GfnRange) -> bool:
        """Whether one mapping reaches beyond `gfns` at both ends: without them it would be two."""
        around = self._record.find(gfns.start)
        return around is not None and around.start < gfns.start and gfns.end < around.end

    def _parts(self, gfns: GfnRange) -> Iterator[GfnRange]:
        """`gfns` cut so that few mappings begin in each part; the caller gives way in between."""
        rest = gfns
        while rest.page_count:
            part = self._record.head(rest, MAPPINGS_PER_PART)
            yield GfnRange(start=part.start, end=part.end)
            rest = GfnRange(start=part.end, end=rest.end)


class Revocation:
    """What the guest is to lose. The hypervisor is asked for as many pieces at once as it takes, so nothing
    is sure to be gone before `finish`.

    It may not fail: the frames will be somebody else's. Raises `PartitionLost` if the hypervisor refuses.
    """

    __slots__ = ("_mappings", "_no_access", "_unmapped")

    def __init__(self, mappings: GuestMappings) -> None:
        """Use `GuestMappings.revocation`."""
        self._mappings = mappings
        self._no_access: list[Piece] = []
        """What the hypervisor is still to be asked for, to be mapped NO_ACCESS and to be unmapped."""
        self._unmapped: list[Piece] = []

    async def revoke(self, region: Region, gfns: GfnRange, *, exactly: bool = False) -> None:
        """Take away what was mapped in `gfns` of the region: movable goes back to NO_ACCESS. At a limit of
        mappings more than `gfns` may go, unless `exactly`."""
        mappings = self._mappings
        assert mappings.lock.is_mine
        room = exactly or mappings._has_room(len(self._no_access) + len(self._unmapped) + 1)
        alone = not room and mappings._is_inside_one(gfns)
        if alone:
            await self.finish()
            gfns = mappings._whole_piece(region, gfns)
        for part in mappings._parts(gfns):
            for run in _runs(mappings._record.clipped(part)):
                if region.kind is RegionKind.MOVABLE:
                    await self._close(region, run)
                else:
                    await self._unmap(region, run)
            if part.end < gfns.end:
                await give_way_shielded()
        if alone:  # a piece to come may be part of what goes too much, and no gfn goes twice
            await self.finish()

    async def unmap_all(self, region: Region, gfns: GfnRange) -> None:
        """Take away all that there is in `gfns` of the region, for good."""
        mappings = self._mappings
        assert mappings.lock.is_mine
        for part in mappings._parts(gfns):
            movable = region.kind is RegionKind.MOVABLE  # whose NO_ACCESS entries go as well
            for run in [part] if movable else _runs(mappings._record.clipped(part)):
                await self._unmap(region, run)
            if part.end < gfns.end:
                await give_way_shielded()

    async def finish(self) -> None:
        """Ask for the rest: then nothing is left of it."""
        if self._no_access:
            await self._ask_to_close()
        if self._unmapped:
            await self._ask_to_unmap()

    async def _close(self, region: Region, gfns: GfnRange) -> None:
        self._no_access.append((region, gfns))
        if len(self._no_access) >= self._mappings._hypervisor.pieces_per_call:
            await self._ask_to_close()

    async def _unmap(self, region: Region, gfns: GfnRange) -> None:
        self._unmapped.append((region, gfns))
        if len(self._unmapped) >= self._mappings._hypervisor.pieces_per_call:
            await self._ask_to_unmap()

    async def _ask_to_close(self) -> None:
        pieces, self._no_access = self._no_access, []
        mappings = [region.no_access(gfns) for region, gfns in pieces]
        await self._ask(pieces, self._mappings._hypervisor.map_gpas(mappings))

    async def _ask_to_unmap(self) -> None:
        pieces, self._unmapped = self._unmapped, []
        await self._ask(pieces, self._mappings._hypervisor.unmap_gpas([gfns for _, gfns in pieces]))

    async def _ask(self, pieces: list[Piece], call: Awaitable[None]) -> None:
        mappings = self._mappings
        with mappings.changing([gfns for _, gfns in pieces]):
            try:
                await call
            except Exception as error:
                done = error.done if isinstance(error, HypervisorError) else 0
                self._forget(pieces[:done])
                left = named([gfns for _, gfns in pieces[done:]])
                raise PartitionLost(f"{left} may still be reached by the guest: {sentence(error)}") from error
            self._forget(pieces)

    def _forget(self, pieces: list[Piece]) -> None:
        for region, gfns in pieces:
            self._mappings._forget(region, gfns)


def _too_many(limit: int) -> str:
    return f"a partition may have {limit} mappings"


def _runs(mappings: Iterable[Mapping]) -> list[GfnRange]:
    """Neighbouring mappings as one range each: they go in one call."""
    runs: list[GfnRange] = []
    for mapping in mappings:
        if runs and runs[-1].end == mapping.start:
            runs[-1] = GfnRange(start=runs[-1].start, end=mapping.end)
        else:
            runs.append(mapping.gfns)
    return runs
