"""A mutant daemon: the real command with one safeguard removed, for tests that must detect it.

Owns the mutants. The first argument names the mutant, the rest go to `interceptd`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Final

from intercept_protocol.addresses import UaddrRange
from intercept_protocol.outcomes import Access
from interceptd.cli import main
from interceptd.memory.attempt import Attempt
from interceptd.memory.guest_mappings import Revocation
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


MUTANTS: Final[Mapping[str, Callable[[], None]]] = {
    "without-invalidation": without_invalidation,
    "without-staleness-check": without_staleness_check,
    "with-hard-coded-rights": with_hard_coded_rights,
}

if __name__ == "__main__":
    MUTANTS[sys.argv.pop(1)]()
    main()
