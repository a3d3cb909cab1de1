"""The random scenario: regions of every kind that overlap and alias, and random verbs.

Owns what is drawn. Must not know what it is for.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Iterable

from intercept_protocol.messages import RegionKind
from intercept_protocol.outcomes import Access

from .script import (
    RW,
    AddRegion,
    Bar,
    Begin,
    ChangeRegions,
    End,
    Invalidate,
    MapVma,
    Pages,
    ProtectVma,
    RemoveRegion,
    Script,
    Touch,
    UnmapVma,
    Verb,
)

CROWD = (
    Bar("A", 0, 16, 0),
    Bar("B", 16, 16, 8, RegionKind.MOVABLE, RW | Access.EXECUTE),
    Bar("C", 32, 8, 4, RegionKind.PINNED),
    Bar("D", 8, 16, 20, access=Access.READ),
    Bar("E", 16, 8, 0, RegionKind.MOVABLE),
    Bar("F", 30, 4, 28),
    Bar("A, shorter", 0, 8, 0),
    Bar("B, read-only", 16, 12, 8, RegionKind.MOVABLE, Access.READ),
    Bar("C, longer", 32, 12, 4, RegionKind.PINNED),
)
"""They overlap in gfns, alias each other's pages, and are of every kind. No two have the same ranges."""
CROWD_PAGES = 36


def random_script(rng: random.Random) -> Script:
    """Random verbs at the same time; many are refused because they conflict."""

    def pages() -> Pages:
        start = rng.randrange(CROWD_PAGES)
        return Pages(start, min(start + rng.randint(4, 20), CROWD_PAGES))

    there = list(CROWD[:3])  # if nothing is refused

    def replace(old: Collection[Bar], candidates: Iterable[Bar]) -> list[Bar]:
        """Those of the candidates for which there is room then."""
        there[:] = [bar for bar in there if bar not in old]
        new: list[Bar] = []
        for bar in candidates:
            if not any(bar.meets(other) for other in there):
                new.append(bar)
                there.append(bar)
        return new

    def edit(number: int) -> Verb:
        match rng.randrange(8):
            case 0 | 1:
                return UnmapVma(pages())
            case 2:
                return MapVma(pages(), 10_000 * (number + 1), rng.choice((Access.READ, RW)))
            case 3:
                return ProtectVma(pages(), rng.choice((Access.READ, RW)))
            case 4:
                gone = rng.choice(CROWD)
                replace((gone,), ())
                return RemoveRegion(gone)
            case 5:
                added = rng.choice(CROWD)
                replace((), (added,))
                return AddRegion(added)
            case _:
                old = [bar for bar in there if rng.random() < 0.6]
                return ChangeRegions(tuple(old), tuple(replace(old, rng.sample(CROWD, 4))))

    def thread() -> tuple[Verb, ...]:
        verbs: list[Verb] = []
        for _ in range(rng.randint(1, 3)):
            held = pages()
            verbs += [Invalidate(held)] if rng.random() < 0.5 else [Begin(held), End(held)]
        return tuple(verbs)

    hot = (0, 9, 15, 17, 23, 31, 33, 39)
    accesses = (Access.READ, Access.WRITE, Access.READ, Access.WRITE, Access.EXECUTE)
    return Script(
        given=(
            MapVma(Pages(0, 12), 1000),
            MapVma(Pages(12, 22), 2000),
            MapVma(Pages(24, 34), 3000),
            *(AddRegion(bar) for bar in CROWD[:3]),
        ),
        vmm=tuple(edit(number) for number in range(rng.randint(2, 6))),
        notifiers=tuple(thread() for _ in range(rng.randint(1, 2))),
        vps=tuple(
            tuple(Touch(rng.choice(hot), rng.choice(accesses)) for _ in range(rng.randint(2, 4)))
            for _ in range(rng.randint(2, 3))
        ),
        refused=rng.choice((frozenset(), frozenset({rng.randint(1, 6)}))),
    )
