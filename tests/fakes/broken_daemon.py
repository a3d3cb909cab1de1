"""A daemon with one thing taken out, for tests that must see it missing.

Owns the breaks; what it runs otherwise is the real command. The first argument names the break, the rest go
to `interceptd`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Final

from intercept_protocol.addresses import UaddrRange
from intercept_protocol.outcomes import Access
from interceptd.cli import main
from interceptd.memory.attempt import Attempt
from interceptd.memory.region import Region
from interceptd.memory.region_manager import RegionManager
from interceptd.pages.mapping import Extent


def without_invalidation() -> None:
    """Invalidations are announced, waited for and acknowledged, and take nothing away (hazards k, H4)."""

    async def take_nothing_away(
        manager: RegionManager, region: Region, uaddrs: UaddrRange, *, exact: bool
    ) -> None:
        pass

    RegionManager._invalidate = take_nothing_away  # type: ignore[method-assign, assignment]


def without_staleness_check() -> None:
    """What was resolved is mapped, whatever happened since (hazard e). Only a race shows it."""

    def never(_: Attempt) -> bool:
        return False

    Attempt.stale = property(never)  # type: ignore[method-assign, assignment]


def with_hard_coded_rights() -> None:
    """The guest gets what the region allows, whatever the VMA does (hazard h)."""

    def those_of_the_region(region: Region, _: Extent) -> Access:
        return region.access

    Region.rights = those_of_the_region  # type: ignore[method-assign, assignment]


BREAKS: Final[Mapping[str, Callable[[], None]]] = {
    "without-invalidation": without_invalidation,
    "without-staleness-check": without_staleness_check,
    "with-hard-coded-rights": with_hard_coded_rights,
}

if __name__ == "__main__":
    BREAKS[sys.argv.pop(1)]()
    main()
