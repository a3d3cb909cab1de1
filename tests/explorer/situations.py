"""The scripts of the scenarios, drawn again for every schedule.

Owns what the VMM, its threads and its guest do in each. Must not know variants, nor what is looked for.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

from intercept_protocol.messages import RegionKind
from intercept_protocol.outcomes import Access
from interceptd.hypervisor.hv_status import HvStatus

from .script import (
    RW,
    AddRegion,
    AwaitVp,
    Bar,
    Begin,
    ChangeRegions,
    Die,
    End,
    Invalidate,
    Kick,
    LendVp,
    MapFixed,
    MapVma,
    Pages,
    ProtectVma,
    RemoveRegion,
    Script,
    Touch,
    UnmapVma,
    Verb,
)

ALL = Pages(0, 16)
BAR = Bar("BAR 0", gfn=100, count=16, page=0)
MOVED = Bar("BAR 0", gfn=200, count=16, page=0)
OTHER = Bar("BAR 2", gfn=108, count=16, page=32)
ALIAS = Bar("alias", gfn=300, count=8, page=4)
RAM = Bar("RAM", gfn=100, count=16, page=0, kind=RegionKind.MOVABLE, access=RW | Access.EXECUTE)
PINNED = Bar("pinned RAM", gfn=100, count=16, page=0, kind=RegionKind.PINNED)
READ_ONLY = Bar("ROM", gfn=100, count=16, page=0, access=Access.READ)
BIG_RAM = Bar("RAM", gfn=0, count=512, page=0, kind=RegionKind.MOVABLE)
LONG_RAM = Bar("RAM", gfn=0, count=1024, page=0, kind=RegionKind.MOVABLE)
GIVEN: tuple[Verb, ...] = (MapVma(ALL, 1000), AddRegion(BAR))


def _vp(rng: random.Random, count: int, *gfns: int) -> tuple[Touch, ...]:
    """Touches of some of these gfns, to read or to write."""
    accesses = (Access.READ, Access.WRITE)
    return tuple(Touch(rng.choice(gfns), rng.choice(accesses)) for _ in range(count))


def two_vps_and_an_unmap(rng: random.Random) -> Script:
    gone = rng.choice((ALL, ALL, Pages(0, 8), Pages(6, 10)))
    after: Sequence[Verb] = rng.choice(([], [MapVma(gone, 2000)]))
    return Script(
        given=GIVEN,
        vmm=(UnmapVma(gone), *after),
        vps=(_vp(rng, 2, 100, 107, 108), _vp(rng, 2, 103, 107)),
    )


def remove_and_add_again(rng: random.Random) -> Script:
    back = rng.choice((BAR, OTHER))
    return Script(
        given=(*GIVEN, MapVma(OTHER.pages, 3000)),
        vmm=(RemoveRegion(BAR), AddRegion(back)),
        vps=(_vp(rng, 2, 100, 108, 115), _vp(rng, 2, 104, 110)),
    )


def _shadow(kind: RegionKind) -> Bar:
    """Other memory behind the gfns of `BAR`."""
    return Bar("ROM", BAR.gfn, BAR.count, 32, kind, Access.READ)


def _beside(rng: random.Random) -> tuple[tuple[Verb, ...], ...]:
    """What threads of the VMM do meanwhile, if anything."""
    pages = rng.choice((ALL, Pages(4, 8), Pages(0, 2), Pages(36, 40)))
    return rng.choice(((), ((Invalidate(pages),),), ((Begin(pages), End(pages)),)))


def shadow(rng: random.Random) -> Script:
    """A ROM takes the place of RAM, and may give it back."""
    ram, rom = (replace(bar, kind=rng.choice(list(RegionKind))) for bar in (BAR, _shadow(RegionKind.MMIO)))
    there, gone = ChangeRegions((ram,), (rom,)), ChangeRegions((rom,), (ram,))
    vp = _vp(rng, 2, 100, 108, 115)
    return Script(
        given=(MapVma(ALL, 1000), MapVma(rom.pages, 3000), AddRegion(ram)),
        vmm=rng.choice(((there,), (there, gone), (there, Kick(0), gone))),
        notifiers=_beside(rng),
        vps=(vp, _vp(rng, 2, 104, 108)),
    )


def bar_move_at_once(rng: random.Random) -> Script:
    kind = rng.choice(list(RegionKind))
    here, there = replace(BAR, kind=kind), replace(MOVED, kind=kind)
    overlapping = replace(there, gfn=BAR.gfn + 8)
    return Script(
        given=(MapVma(ALL, 1000), AddRegion(here)),
        vmm=(ChangeRegions((here,), (rng.choice((there, overlapping)),)),),
        notifiers=_beside(rng),
        vps=(_vp(rng, 2, 100, 107, 108), _vp(rng, 2, 115, 116, 200, 207)),
    )


def swap(rng: random.Random) -> Script:
    kinds = rng.choice(list(RegionKind)), rng.choice(list(RegionKind))
    one, other = (Bar(f"BAR {n}", 100 + 100 * n, 16, 32 * n, kind) for n, kind in enumerate(kinds))
    exchanged = replace(one, gfn=other.gfn), replace(other, gfn=one.gfn)
    return Script(
        given=(MapVma(ALL, 1000), MapVma(other.pages, 3000), AddRegion(one), AddRegion(other)),
        vmm=(ChangeRegions((one, other), exchanged),),
        notifiers=_beside(rng),
        vps=(_vp(rng, 2, 100, 108, 200), _vp(rng, 2, 107, 200, 208)),
    )


def resize(rng: random.Random) -> Script:
    """A region grows, shrinks, is given a hole or other rights: some of what is mapped stays."""
    kind = rng.choice(list(RegionKind))
    whole = replace(BAR, kind=kind)
    short, tail = replace(whole, count=6), Bar("the end of BAR 0", 110, 6, 10, kind)
    read_only = replace(tail, access=Access.READ)
    before, after = rng.choice(
        (
            ((whole,), (short,)),
            ((short,), (whole,)),
            ((whole,), (short, tail)),
            ((whole,), (short, read_only)),
            ((short, read_only), (short, tail)),
            ((short, tail), (whole,)),
        )
    )
    return Script(
        given=(MapVma(ALL, 1000), *map(AddRegion, before)),
        vmm=(ChangeRegions(before, after),),
        notifiers=_beside(rng),
        vps=(_vp(rng, 3, 100, 105, 107, 112), _vp(rng, 2, 102, 110, 115)),
    )


def refused_change(rng: random.Random) -> Script:
    """The hypervisor refuses what one of the new regions needs, or the map of a fault before."""
    old = replace(BAR, kind=rng.choice(list(RegionKind)))
    beside = Bar("RAM", 200, 8, 8, RegionKind.MOVABLE)
    play = Script(
        given=(MapVma(ALL, 1000), MapVma(_shadow(RegionKind.PINNED).pages, 3000), AddRegion(old)),
        vmm=(),
        vps=(_vp(rng, 2, 100, 108, 115), _vp(rng, 2, 104, 200)),
    )
    if rng.random() < 0.5:
        change = ChangeRegions((old,), (beside, _shadow(RegionKind.PINNED)))
        refused = frozenset({2 if old.kind is RegionKind.PINNED else rng.choice((1, 2))})
        return replace(play, vmm=(change,), notifiers=_beside(rng), refused=refused)
    change = ChangeRegions((old,), (_shadow(RegionKind.MOVABLE), beside))
    failing = {rng.choice((2, 3, 4)): HvStatus.INSUFFICIENT_MEMORY}  # with 1, RAM is made NO_ACCESS at first
    return replace(play, vmm=(change,), failing=failing)


def remove_and_invalidate(rng: random.Random) -> Script:
    return Script(
        given=GIVEN,
        vmm=(RemoveRegion(BAR),),
        notifiers=((Begin(ALL), End(ALL)),),
        vps=(_vp(rng, 2, 100, 108, 115),),
    )


def bar_move(rng: random.Random) -> Script:
    return Script(
        given=GIVEN,
        vmm=(RemoveRegion(BAR), AddRegion(MOVED)),
        vps=(_vp(rng, 2, 100, 107), _vp(rng, 2, 200, 207)),
    )


def roll_back(rng: random.Random) -> Script:
    """Holes in what is mapped, so that one commit is several maps, and one of them is refused."""
    return Script(
        given=GIVEN,
        vmm=(),
        notifiers=((Invalidate(Pages(4, 8)), Invalidate(Pages(10, 12))),),
        vps=(_vp(rng, 3, 100, 104, 110), _vp(rng, 3, 105, 108, 111)),
        refused=frozenset({rng.choice((1, 2, 3))}),
    )


def deposit_failure(rng: random.Random) -> Script:
    """The hypervisor has no memory for its second batch of 509, and the first is rolled back."""
    return Script(
        given=(MapVma(BIG_RAM.pages, 10000), AddRegion(BIG_RAM)),
        vmm=(),
        vps=(_vp(rng, 2, 0, 100, 510), _vp(rng, 2, 3, 100)),
        failing={4: HvStatus.INSUFFICIENT_MEMORY},  # 1 and 2 make it NO_ACCESS
    )


def bar_without_memory(rng: random.Random) -> Script:
    """A BAR of two batches, and the hypervisor fails the second."""
    bar = Bar("BAR 4", gfn=1000, count=600, page=0)
    return Script(
        given=(MapVma(bar.pages, 10000), AddRegion(bar)),
        vmm=(),
        vps=(_vp(rng, 2, 1000, 1100, 1599), _vp(rng, 2, 1000, 1100)),
        failing={rng.choice((2, 4)): HvStatus.INSUFFICIENT_MEMORY},
    )


def vmm_death(rng: random.Random) -> Script:
    changes: Sequence[Verb] = rng.choice(([], [UnmapVma(Pages(0, 4))], [RemoveRegion(BAR)]))
    return Script(
        given=(*GIVEN, MapVma(Pages(64, 80), 5000), AddRegion(Bar("RAM", 400, 16, 64, RegionKind.MOVABLE))),
        vmm=(*changes, Die()),
        notifiers=((Invalidate(ALL),),),
        vps=(_vp(rng, 2, 100, 107), _vp(rng, 2, 400, 407)),
    )


def invalidate_storm(rng: random.Random) -> Script:
    def storm(*starts: int) -> tuple[Verb, ...]:
        return tuple(Invalidate(Pages(start, start + 4)) for start in starts)

    return Script(
        given=GIVEN,
        vmm=(),
        notifiers=(storm(0, 8), storm(4, 12), storm(8)),
        vps=(_vp(rng, 3, 100, 109), _vp(rng, 2, 105, 115)),
    )


def nested_begins(rng: random.Random) -> Script:
    wide = rng.choice((ALL, Pages(2, 8)))
    first, second = (Begin(wide), End(wide)), (Begin(wide), End(wide))
    return Script(given=GIVEN, vmm=(), notifiers=(first, second), vps=(_vp(rng, 3, 103, 105, 107),))


def begin_beside_a_fault(rng: random.Random) -> Script:
    """A fault outside an open range must not map into it."""
    part = rng.choice((Pages(4, 8), Pages(0, 2), Pages(12, 16)))
    return Script(
        given=GIVEN,
        vmm=(),
        notifiers=((Begin(part), End(part)),),
        vps=(_vp(rng, 2, 103, 109), _vp(rng, 1, 105)),
    )


def region_added_in_an_open_range(rng: random.Random) -> Script:
    return Script(
        given=(MapVma(ALL, 1000),),
        vmm=(AddRegion(BAR), AddRegion(ALIAS)),
        notifiers=((Begin(Pages(4, 8)), End(Pages(4, 8))),),
        vps=(_vp(rng, 2, 103, 105), _vp(rng, 2, 300, 301)),
    )


def pinned_add(rng: random.Random) -> Script:
    sudden: tuple[Verb, ...] = rng.choice(
        ((Invalidate(Pages(4, 8)),), (Begin(Pages(4, 8)), End(Pages(4, 8))), (Invalidate(ALL),))
    )
    return Script(
        given=(MapVma(ALL, 1000),),
        vmm=(AddRegion(PINNED),),
        notifiers=(sudden,),
        vps=(_vp(rng, 3, 103, 105),),
    )


def aliases(rng: random.Random) -> Script:
    return Script(
        given=(*GIVEN, AddRegion(ALIAS)),
        vmm=(UnmapVma(rng.choice((ALL, Pages(4, 12)))),),
        vps=(_vp(rng, 2, 100, 105), _vp(rng, 2, 300, 303)),
    )


def msix_hole(rng: random.Random) -> Script:
    """The page of the MSI-X table is left out so that it traps; two VMAs stand behind one region."""
    return Script(
        given=(MapVma(Pages(0, 6), 1000), MapVma(Pages(7, 16), 3000), AddRegion(BAR)),
        vmm=(),
        vps=(_vp(rng, 2, 100, 105), _vp(rng, 2, 106, 107, 112)),
    )


def region_before_its_vma(rng: random.Random) -> Script:
    """The frames behind the fault begin at a number that is smaller than the fault's offset."""
    return Script(
        given=(MapVma(Pages(0, 2), 5000), MapVma(Pages(4, 16), 1), AddRegion(BAR)),
        vmm=(),
        vps=(_vp(rng, 1, 104, 107, 115),),
    )


def read_only(rng: random.Random) -> Script:
    bar, vma = rng.choice(((READ_ONLY, RW), (READ_ONLY, Access.READ), (BAR, Access.READ)))
    return Script(
        given=(MapVma(ALL, 1000, vma), AddRegion(bar)),
        vmm=(),
        vps=((Touch(100), Touch(105, Access.WRITE)), _vp(rng, 1, 103)),
    )


def rights_go(rng: random.Random) -> Script:
    return Script(
        given=GIVEN,
        vmm=(ProtectVma(rng.choice((ALL, Pages(0, 8))), Access.READ),),
        vps=(_vp(rng, 2, 100, 107), (Touch(103, Access.WRITE), Touch(103, Access.WRITE))),
    )


def movable(rng: random.Random) -> Script:
    gone = rng.choice((ALL, Pages(4, 8)))
    return Script(
        given=(MapVma(ALL, 1000), AddRegion(RAM)),
        vmm=(UnmapVma(gone), MapVma(gone, 2000)),
        vps=(_vp(rng, 2, 100, 105), _vp(rng, 2, 104, 110)),
        refused=rng.choice((frozenset(), frozenset({1}), frozenset({2}))),
    )


def several_vmas(rng: random.Random) -> Script:
    """Two VMAs behind one region, the first of them in two of the blocks that a fault maps. Some of them is
    replaced, as live memory is: nothing but a begin and an end tells of it."""
    gone = rng.choice((Pages(520, 560), Pages(690, 760)))
    replaced = (Begin(gone), MapFixed(gone, 40_000), End(gone))
    gone_and_back = (UnmapVma(gone), MapVma(gone, 50_000))
    vmm, *notifiers = rng.choice((((), replaced), ((), replaced), (gone_and_back,)))
    return Script(
        given=(
            MapVma(Pages(0, 700), 10_000),
            MapVma(Pages(700, LONG_RAM.count), 20_000),
            AddRegion(LONG_RAM),
        ),
        vmm=vmm,
        notifiers=tuple(notifiers),
        vps=((Touch(5), *_vp(rng, 2, 530, 550)), _vp(rng, 3, 530, 695, 705)),
    )


def no_translation(rng: random.Random) -> Script:
    """A page-table walk faults: the message's gpa is not the translation of a gva."""
    return Script(given=GIVEN, vmm=(), vps=((Touch(rng.choice((100, 107)), translated=False),),))


def trapped(rng: random.Random) -> Script:
    """The hypervisor keeps raising the intercept for a page that it was told to map."""
    return Script(given=GIVEN, vmm=(), vps=((Touch(rng.choice((100, 107)), trapped=True),),))


def kick(rng: random.Random) -> Script:
    """A VMM thread wants its VP back while a range is open: it kicks it and waits, as the protocol allows."""
    wide = rng.choice((ALL, Pages(2, 8)))
    return Script(
        given=GIVEN,
        vmm=(Begin(wide), Kick(0), AwaitVp(0), End(wide)),
        vps=(_vp(rng, 1, 103, 105),),
    )


def another_process(rng: random.Random) -> Script:
    """The VMM forked, or passed a VP's descriptor on: whose memory is used?"""
    return Script(
        given=(*GIVEN, LendVp(1, MapVma(ALL, 7000))),
        vmm=(),
        vps=(_vp(rng, 1, 100, 107), _vp(rng, 2, 103, 108)),
    )


def flood(rng: random.Random) -> Script:
    """So many pages go by themselves that their list becomes "everything"; the region's are the last."""
    last = Pages(2200, 2216)
    bar = Bar("BAR 0", gfn=100, count=16, page=last.start)
    beside: tuple[Verb, ...] = rng.choice(((), (Invalidate(Pages(2204, 2208)),)))
    return Script(
        given=(MapVma(last, 1000), AddRegion(bar)),
        vmm=(),
        notifiers=((Invalidate(Pages(0, last.end, step=2)),), beside),
        vps=(_vp(rng, 2, 100, 107, 110), _vp(rng, 2, 103, 110)),
    )
