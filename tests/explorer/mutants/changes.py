"""Mutants of a change of regions.

Owns the mutants. Each class is the daemon's except for the fault that its docstring names.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager

from explorer.script import RW
from intercept_protocol.addresses import GfnRange, UaddrRange
from interceptd.memory import guest_mappings
from interceptd.memory.attempt import Whole
from interceptd.memory.guest_mappings import GuestMappings
from interceptd.memory.mapping_change import MappingChange
from interceptd.memory.region import Region
from interceptd.memory.region_change import RegionChange
from interceptd.memory.region_manager import RegionManager
from interceptd.mmu_notifier import MmuNotifier
from interceptd.pages.mapping import Mapping

Ranges = Sequence[tuple[GfnRange, UaddrRange]]


class RemovesThenAdds(RegionManager):
    """A change takes the old regions out, and lets go of the lock before it puts the new ones in."""

    async def change(self, remove: Ranges, add: Sequence[Region], wholes: Sequence[Whole] = ()) -> None:
        async with self._lock:
            change = self._checked(remove, add, wholes)
            mapping_change = MappingChange(self._mappings, change)
            with self._mappings.changing(change.changing):
                self._exchange(change.old, [])
                await mapping_change.take_away()
        async with self._lock:
            with self._mappings.changing(change.changing):
                self._exchange([], change.new)
                await mapping_change.make(wholes)


class MapsTheNewFirst(RegionManager):
    """A change maps what it adds before it takes away what that does not overlap."""

    async def change(self, remove: Ranges, add: Sequence[Region], wholes: Sequence[Whole] = ()) -> None:
        async with self._lock:
            change = self._checked(remove, add, wholes)
            apart = [
                (region, gfns)
                for region, gfns in change.going
                if not any(gfns.overlaps(coming) for _, coming in change.coming)
            ]
            later = RegionChange([], [])
            later.going = apart
            change.going = [piece for piece in change.going if piece not in apart]
            mapping_change = MappingChange(self._mappings, change)
            with self._mappings.changing(change.changing):
                await mapping_change.take_away()
                self._exchange(change.old, change.new)
                await mapping_change.make(wholes)
                await MappingChange(self._mappings, later).take_away()


class KeepsNothing(RegionManager):
    """A change takes away what old and new regions have in common, too."""

    def _checked(self, remove: Ranges, add: Sequence[Region], wholes: Sequence[Whole]) -> RegionChange:
        change = super()._checked(remove, add, wholes)
        change.kept = []
        change.going = [(region, region.gfns) for region in change.old]
        change.coming = [(region, region.gfns) for region in change.new]
        change.changing = [gfns for _, gfns in (*change.going, *change.coming)]
        return change


class KeepsWhateverTheRights(RegionManager):
    """A change leaves what is mapped though old and new regions give other rights."""

    def _checked(self, remove: Ranges, add: Sequence[Region], wholes: Sequence[Whole]) -> RegionChange:
        rights = [(region, region.access) for region in (*self._regions, *add)]
        for region, _ in rights:
            region.access = RW
        try:
            return super()._checked(remove, add, wholes)
        finally:
            for region, access in rights:
                region.access = access


class LetsFaultsThrough(RegionManager):
    """Faults on what changes wait only while the hypervisor is asked about it."""

    def _checked(self, remove: Ranges, add: Sequence[Region], wholes: Sequence[Whole]) -> RegionChange:
        change = super()._checked(remove, add, wholes)
        change.changing = []
        return change


class ExchangesUnmarked(MmuNotifier):
    """A change does not mark the attempts in the old regions stale."""

    def mark_all_stale(self, ranges: Iterable[UaddrRange]) -> None:
        pass


class KeepsTheRefused(RegionManager):
    """After a change that was refused the new regions stay in the list."""

    _new: Iterable[Region] = ()

    def _exchange(self, old: Iterable[Region], new: Iterable[Region]) -> None:
        back = old is self._new
        self._new = new
        if not back:
            super()._exchange(old, new)


class TrustsStaleWholes(RegionManager):
    """A change maps a pinned region although it was invalidated while it was resolved."""

    def _checked(self, remove: Ranges, add: Sequence[Region], wholes: Sequence[Whole]) -> RegionChange:  # noqa: ARG002
        return super()._checked(remove, add, ())


class ForgetsWhatWasPinned(GuestMappings):
    """A refused change does not map again what it took away of pinned regions."""

    async def map_again(self, region: Region, taken: Iterable[Mapping]) -> None:
        pass


class _Unwaking(guest_mappings._Change):
    _has_calls = False

    def __enter__(self) -> None:
        super().__enter__()
        if isinstance(self.around, _Unwaking):
            self.around._has_calls = True

    def __exit__(self, *error: object) -> None:
        if self._has_calls:
            self._over = None
        super().__exit__(*error)


class WakesNobody(GuestMappings):
    """Faults that waited for a change of regions are not woken at its end."""

    def changing(self, gfns: Sequence[GfnRange]) -> AbstractContextManager[None]:
        return _Unwaking(self, gfns)
