"""What a VMM toggles between: two layouts of regions, as for a ROM shadow or a BAR that moves.

Owns the layouts, what an access is to be answered in each, and the count of what was found. Must not know who
changes or accesses anything.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum
from itertools import chain
from typing import Final

from intercept_client import NewRegion
from intercept_protocol.addresses import GfnRange, UaddrRange
from intercept_protocol.messages import RequestedKind
from intercept_protocol.outcomes import Access, Answer, AnyAnswer

PAGES: Final = 8
"""The memory of one toggle, which shows at most so many gfns before and after."""
GFN, GFNS_APART = 0xC0, 0x100
"""Where the first toggle shows its memory, and how far the next one is away."""
Layout = tuple[NewRegion, ...]
Removal = tuple[GfnRange, UaddrRange]
EXAMPLES: Final = 8
"""Of what was wrong, for people; all of it is counted."""


class How(Enum):
    """How a VMM gets from one layout to the other."""

    IN_ONE_STEP = "change_regions"
    IN_TWO_STEPS = "remove_region, then add_regions"


@dataclass(slots=True)
class Findings:
    """Of a race between changes and accesses."""

    changes: int = 0
    accesses: int = 0
    during_a_change: int = 0
    """Accesses that may have met either layout, where that is known."""
    answers: Counter[AnyAnswer] = field(default_factory=Counter)
    pages_reached: int = 0
    """Mappings that were looked at while no change was under way."""
    gaps: int = 0
    """Answers `no_region` where both layouts have a region."""
    wrong: int = 0
    """Answers, values and mappings that are of neither layout, or no longer."""
    examples: list[str] = field(default_factory=list)

    def object(self, what: str) -> None:
        self.wrong += 1
        if len(self.examples) < EXAMPLES:
            self.examples.append(what)


@dataclass(frozen=True, slots=True)
class Toggle:
    """Two layouts. The first is there to begin with; each change makes it the other one."""

    layouts: tuple[Layout, Layout]

    def after(self, changes: int) -> Layout:
        return self.layouts[changes % 2]

    def removed(self, change: int) -> list[Removal]:
        """By the change of this number, from 0."""
        return [(region.gfns, region.uaddrs) for region in self._only_in(change, change + 1)]

    def added(self, change: int) -> list[NewRegion]:
        return list(self._only_in(change + 1, change))

    def covers_always(self, gfn: int) -> bool:
        """Whether both layouts do."""
        return all(page_behind(layout, gfn) is not None for layout in self.layouts)

    def gfns(self) -> list[int]:
        """All that either layout covers."""
        return sorted({gfn for layout in self.layouts for region in layout for gfn in _pages(region.gfns)})

    def _only_in(self, there: int, not_there: int) -> Iterator[NewRegion]:
        return (region for region in self.after(there) if region not in self.after(not_there))


def page_behind(layout: Layout, gfn: int) -> int | None:
    """The page of the VMM's memory that the guest may reach there."""
    region = _region_at(layout, gfn)
    return None if region is None else region.uaddrs.start + gfn - region.gfns.start


def answer_to(layout: Layout, gfn: int, access: Access) -> Answer:
    """What a VP is to be answered in the end; `MAPPED` stands for `ALREADY_MAPPED` too."""
    region = _region_at(layout, gfn)
    if region is None:
        return Answer.NO_REGION
    return Answer.MAPPED if access is Access.READ or region.writable else Answer.PERMISSION


def _region_at(layout: Layout, gfn: int) -> NewRegion | None:
    return next((region for region in layout if gfn in region.gfns), None)


def _pages(gfns: GfnRange) -> range:
    return range(gfns.start, gfns.end)


class _Place:
    """Where the regions of one toggle lie: gfns and pages from 0 on."""

    def __init__(self, gfn: int, page: int) -> None:
        self._gfn = gfn
        self._page = page

    def region(
        self,
        gfn: int,
        page: int,
        count: int,
        kind: RequestedKind = RequestedKind.MOVABLE,
        *,
        writable: bool = True,
    ) -> NewRegion:
        return NewRegion(
            gfns=GfnRange.of(self._gfn + gfn, count),
            uaddrs=UaddrRange(start=self._page + page, end=self._page + page + count),
            kind=kind,
            writable=writable,
            executable=False,
        )


def rom_shadow(gfn: int, page: int) -> Toggle:
    """The firmware's ROM, or the RAM that it is copied to."""
    at = _Place(gfn, page)
    return Toggle(((at.region(0, 0, 4, writable=False),), (at.region(0, 4, 4),)))


def moving_bar(gfn: int, page: int) -> Toggle:
    """A BAR that moves by half its size: the gfns in the middle are covered before and after."""
    at, mmio = _Place(gfn, page), RequestedKind.MMIO
    return Toggle(((at.region(0, 0, 4, mmio),), (at.region(2, 0, 4, mmio),)))


def rights(gfn: int, page: int) -> Toggle:
    at = _Place(gfn, page)
    return Toggle(((at.region(0, 0, 8),), (at.region(0, 0, 8, writable=False),)))


def swap(gfn: int, page: int) -> Toggle:
    at = _Place(gfn, page)
    straight = (at.region(0, 0, 4), at.region(4, 4, 4))
    return Toggle((straight, (at.region(0, 4, 4), at.region(4, 0, 4))))


def resize(gfn: int, page: int) -> Toggle:
    """Grows and shrinks."""
    at, mmio = _Place(gfn, page), RequestedKind.MMIO
    return Toggle(((at.region(0, 0, 3, mmio),), (at.region(0, 0, 8, mmio),)))


def hole(gfn: int, page: int) -> Toggle:
    at = _Place(gfn, page)
    return Toggle(((at.region(0, 0, 8),), (at.region(0, 0, 3), at.region(5, 5, 3))))


Kind = Callable[[int, int], Toggle]
"""Makes a toggle at a gfn, over `PAGES` pages from a page on."""
MOVES: Final[tuple[Kind, ...]] = (rom_shadow, moving_bar)
OTHERS: Final[tuple[Kind, ...]] = (rights, swap, resize, hole)


def all_at_once(kinds: Sequence[Kind], first_page: int) -> Toggle:
    """One toggle of each kind, each with memory of its own; a change changes all of them."""
    parts = [kind(GFN + n * GFNS_APART, first_page + n * PAGES) for n, kind in enumerate(kinds)]
    before, after = (tuple(chain.from_iterable(part.after(n) for part in parts)) for n in (0, 1))
    return Toggle((before, after))
