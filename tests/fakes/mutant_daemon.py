"""A mutant daemon: the real command with one safeguard removed, for tests that must detect it.

Owns the mutants. The first argument names the mutant, the rest go to `interceptd`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Final

import trio

from intercept_protocol.addresses import GfnRange, UaddrRange
from intercept_protocol.outcomes import Access
from interceptd.cli import main
from interceptd.memory.attempt import Attempt
from interceptd.memory.guest_mappings import Revocation
from interceptd.memory.mapping_change import MappingChange
from interceptd.memory.region import Region
from interceptd.memory.region_manager import RegionManager
from interceptd.pages.mapping import Extent


def without_invalidation() -> None:
    """Invalidations are announced, waited for and acknowledged, but revoke nothing (hazards k, H4)."""

    async def revoke_nothing(
        manager: RegionManager, region: Region, uaddrs: UaddrRange, going: Revocation, *, exact: bool
    ) -> None:
        pass

    RegionManager._invalidate = revoke_nothing  # type: ignore[method-assign, assignment]


def without_staleness_check() -> None:
    """What was resolved is mapped even if it has become stale (hazard e). Only a race shows it."""

    def never(_: Attempt) -> bool:
        return False

    Attempt.stale = property(never)  # type: ignore[method-assign, assignment]


def with_hard_coded_rights() -> None:
    """The guest gets the rights of the region, whatever those of the VMA (hazard h)."""

    def those_of_the_region(region: Region, _: Extent) -> Access:
        return region.access

    Region.rights = those_of_the_region  # type: ignore[method-assign, assignment]


def changing_in_two_steps() -> None:
    """The regions of a change are removed, and then the others are added."""

    async def remove_and_add(
        manager: RegionManager,
        remove: Sequence[tuple[GfnRange, UaddrRange]],
        add: Sequence[Region],
        _: object = (),
    ) -> None:
        for gfns, uaddrs in remove:
            await manager.remove_exactly(gfns, uaddrs)
        await trio.lowlevel.checkpoint()
        for region in add:
            await manager.add(region)

    RegionManager.change = remove_and_add  # type: ignore[method-assign, assignment]


def without_taking_away() -> None:
    """A change of regions leaves mapped what only the old ones give."""

    async def take_nothing(_: MappingChange) -> None:
        pass

    MappingChange.take_away = take_nothing  # type: ignore[method-assign, assignment]


def without_forgetting_attempts() -> None:
    """What was resolved for a region is mapped after a change has removed it. Only a race shows it."""

    def exchange(manager: RegionManager, old: Iterable[Region], new: Iterable[Region]) -> None:
        for region in old:
            manager._unlink(region)
        for region in new:
            manager._regions.link(region)
            manager._quota.add(1)

    RegionManager._exchange = exchange  # type: ignore[method-assign, assignment]


MUTANTS: Final[Mapping[str, Callable[[], None]]] = {
    "without-invalidation": without_invalidation,
    "without-staleness-check": without_staleness_check,
    "changing-in-two-steps": changing_in_two_steps,
    "without-forgetting-attempts": without_forgetting_attempts,
    "without-taking-away": without_taking_away,
    "with-hard-coded-rights": with_hard_coded_rights,
}

if __name__ == "__main__":
    MUTANTS[sys.argv.pop(1)]()
    main()
