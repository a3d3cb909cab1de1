"""Mutants of what is remembered of VMAs: each takes out one of its rules.

Owns the mutants. Each class is the daemon's except for the fault that its docstring names.
"""

from __future__ import annotations

import trio

from intercept_protocol.addresses import UaddrRange
from interceptd.address_space import AddressSpace
from interceptd.memory.fault_handler import FaultHandler
from interceptd.memory.known_vmas import KnownVmas
from interceptd.memory.region import Region
from interceptd.memory.region_manager import RegionManager
from interceptd.mmu_notifier import Window
from interceptd.pages.mapping import Extent


class RemembersForEver(KnownVmas):
    """What was learned of a VMA is never forgotten."""

    def forget(self, uaddrs: UaddrRange) -> None:
        pass


class LearnsStale(RegionManager):
    """What was looked up is learned although an invalidation came meanwhile."""

    def open_look(self, region: Region, page: int) -> Window:
        look = super().open_look(region, page)
        self.close_look(look)  # nobody sees it
        return look


class LooksAtTheAttempt(RegionManager):
    """A look over a whole region becomes stale only where its attempt does."""

    def open_look(self, region: Region, page: int) -> Window:
        wide = super().open_look(region, page)
        self.close_look(wide)
        gfn = page - region.uaddrs.start + region.gfns.start
        seen = self.window(region, gfn).clip(wide.uaddrs)
        assert seen is not None, "the page lies in both"
        return _Shown(wide.uaddrs, self._notifier.open_window(seen))

    def close_look(self, look: Window) -> None:
        super().close_look(look.seen if isinstance(look, _Shown) else look)


class _Shown(Window):
    """Stale when another one is that is seen in its place."""

    __slots__ = ("seen",)

    def __init__(self, uaddrs: UaddrRange, seen: Window) -> None:
        self.seen = seen
        self.uaddrs = uaddrs

    @property
    def stale(self) -> bool:  # type: ignore[override]
        return self.seen.stale

    @property
    def closed(self) -> trio.Event | None:  # type: ignore[override]
        return self.seen.closed


class LooksIntoOpenRanges(RegionManager):
    """What lies in an open invalidation is looked up and learned, too."""

    def open_look(self, region: Region, page: int) -> Window:  # noqa: ARG002
        return self._notifier.open_window(region.uaddrs)


class RemembersHoles(FaultHandler):
    """A page without a VMA is remembered like one with a VMA."""

    async def _ask(self, page: int, window: UaddrRange, region: Region) -> Extent | None:
        if page in self._holes:
            return None
        extent = await super()._ask(page, window, region)
        if extent is None:
            self._holes.add(page)
        return extent

    def __init__(
        self, regions: RegionManager, address_space: AddressSpace, timeout: float, known: KnownVmas
    ) -> None:
        super().__init__(regions, address_space, timeout, known)
        self._holes: set[int] = set()
        regions.learn_in_windows(self._forget_holes)

    def _forget_holes(self, uaddrs: UaddrRange) -> None:
        self._holes = {page for page in self._holes if page not in uaddrs}
