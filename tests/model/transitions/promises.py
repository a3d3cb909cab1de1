"""What must hold in every order of the rows of the transition table.

Owns the promises, in the words of the invariants. Must not know who checks them.
"""

from __future__ import annotations

from model.transitions.table import (
    BACKED,
    COVERED,
    DUE,
    GOING,
    LOCK,
    OLD,
    ONE,
    OPEN,
    OPENED,
    PAGE,
    PHASE,
    REACHED,
    RECORD,
    REGION,
    SERVING,
    SOME,
    TURNING,
    Lock,
    Phase,
)
from model.transitions.terms import NOTHING, AnyIs, Apart, Either, Is, OfAll, Promise, Within

_UNDER_THE_LOCK = {
    "mapped": (Lock.VP,),
    "map_is_back": (Lock.VP,),
    "taken_away": (Lock.MANAGER,),
    "take_away_is_back": (Lock.MANAGER,),
    "unmapped": (Lock.REMOVER, Lock.CHANGER),
    "unmap_is_back": (Lock.REMOVER, Lock.CHANGER),
}

PROMISES = (
    Promise("I1: what the guest reaches of old frames is not acknowledged yet", Within(OLD, OfAll(DUE))),
    Promise("I2: what the guest reaches is memory", Within(REACHED, BACKED | OLD)),
    Promise(
        "I2: what the guest reaches lies in the region, unless that is being removed",
        Either(Within(REACHED, REGION), Is(LOCK, (Lock.REMOVER,))),
    ),
    Promise("I10: what the guest reaches is on record", Within(REACHED, RECORD)),
    Promise(
        "the lock is let go of",
        Either(Is(LOCK, tuple(lock for lock in Lock if lock is not Lock.VP)), AnyIs(PHASE, Phase.MAPPING)),
    ),
    Promise("I10: who is told resume reaches it", Within(ONE, REACHED), at="resume"),
    Promise(
        "nobody is told resume for what is known to be gone",
        Apart(ONE & OLD, GOING | SERVING),
        at="resume",
    ),
    Promise("I10: who is told mapped reaches it", Within(PAGE, REACHED), at="finish"),
    Promise("forward is said of what is not there", Apart(PAGE, BACKED), at="forward"),
    Promise("forward is not said of what is being changed", Apart(PAGE, OPEN), at="forward"),
    Promise("I9: what is mapped is not mapped again", Apart(SOME, REACHED), at="map"),
    Promise("I1: memory is changed where the guest does not reach it", Apart(REACHED, OPENED), at="change"),
    Promise(
        "a source that begins another invalidation has ended its last one",
        Within(OPENED | DUE, NOTHING),
        at="begin_invalidation",
    ),
    *(
        Promise(
            "I5: the hypervisor is asked, and its answer taken, under the lock", Is(LOCK, holders), at=row
        )
        for row, holders in _UNDER_THE_LOCK.items()
    ),
    Promise("a pass takes away what is going, and nothing else", Within(SOME, SERVING), at="take_away"),
    Promise("a region is added where nothing of another is left", Within(REACHED, NOTHING), at="add"),
    Promise(
        "P-34: what a region covers before and after a change is said to be in one",
        Apart(ONE, COVERED),
        at="no_region",
    ),
    Promise(
        "P-34: a change takes away what it turns, and nothing else",
        Either(Is(LOCK, (Lock.REMOVER,)), Within(SOME, TURNING)),
        at="unmap",
    ),
    Promise(
        "P-34: regions are exchanged where nothing is left of what turns",
        Within(REACHED, REGION - TURNING),
        at="exchange",
    ),
)
