"""The algorithm of begin, resolve, commit, invalidate and a change of regions as a table of steps.

Owns the variables and the rows; `promises` says what must hold whatever order they are taken in. A row states
the least that safety needs: what the daemon asks for besides, to save a call or a wait, is its own affair.
Nothing of the daemon runs it. `tests/model` holds the running code against it step by step, and prints it as
the Promela model that spin searches: a row that allows too much breaks a promise there, one that allows too
little is broken by the code. Must not know tasks, ranges, rights, or kinds of regions: all are MMIO, and
lie in a few pages, each of which stands for one uaddr.
"""

from __future__ import annotations

from enum import Enum

from model.transitions.terms import (
    EVERYTHING,
    NOTHING,
    Actor,
    Apart,
    Effect,
    Either,
    Is,
    Meet,
    OfAll,
    Pages,
    Parameter,
    Put,
    PutEach,
    Row,
    Table,
    Variable,
    Within,
)


class Lock(Enum):
    FREE = "free"
    VP = "vp"
    MANAGER = "manager"
    REMOVER = "remover"
    CHANGER = "changer"


class Phase(Enum):
    """Of one VP."""

    IDLE = "idle"
    RESOLVING = "resolving"
    RESOLVED = "resolved"
    MAPPING = "mapping"


class Reliance(Enum):
    """Whether an attempt may still rely on its window."""

    FRESH = "fresh"
    STALE = "stale"


class Notice(Enum):
    """Of one source of invalidations."""

    NONE = "none"
    BEGUN = "begun"
    OPEN = "open"
    """Begun and acknowledged: the VMM may change the memory."""
    GONE = "gone"
    """The memory was unmapped without an announcement yet."""
    TOLD = "told"


class Batch(Enum):
    """How far the pass is that a source waits for."""

    DONE = "done"
    PENDING = "pending"
    SERVING = "serving"


LOCK = Variable("lock", initially=Lock.FREE)
REGION = Variable("region")
"""The pages of the regions that are in the list."""
COVERED = Variable("covered")
"""The pages that lie in a region before and after the change of regions under way."""
TURNING = Variable("turning")
"""The pages that this change gives to the guest differently, or not at all, before or after."""
BACKED = Variable("backed", initially=EVERYTHING)
"""The pages behind which the VMM has memory."""
RECORD = Variable("record")
CHANGING = Variable("changing")
"""What the lock's holder is mapping or unmapping now."""
REACHED = Variable("reached")
"""What the guest reaches: the hypervisor's table."""
OLD = Variable("old")
"""Of that, what was made from frames that are no longer the VMM's."""
GOING = Variable("going")
"""Invalidated, and waiting for a pass of the region manager."""
SERVING = Variable("serving")
"""What the pass takes away."""

KNOWN = Variable("known")
"""The pages of which it is remembered what backs them."""
MISTAKEN = Variable("mistaken")
"""Of those, what was learned before the memory changed; of other pages it says nothing."""

PHASE = Variable("phase", Actor.VP, Phase.IDLE)
PAGE = Variable("page", Actor.VP)
WINDOW = Variable("window", Actor.VP)
RELIANCE = Variable("reliance", Actor.VP, Reliance.FRESH)
EXTENT = Variable("extent", Actor.VP)
"""The pages whose frames were found."""
SEEN = Variable("seen", Actor.VP)
"""The pages that may be learned of what was found: it reaches beyond the window."""
SIGHT = Variable("sight", Actor.VP, Reliance.FRESH)
"""Whether what was seen may still be learned."""
OUTDATED = Variable("outdated", Actor.VP)
"""Of the extent, what was found before the memory changed."""
MISSEEN = Variable("misseen", Actor.VP)
"""The same of what was seen."""

NOTICE = Variable("notice", Actor.SOURCE, Notice.NONE)
OPENED = Variable("opened", Actor.SOURCE)
"""Between this source's begin and its end."""
DUE = Variable("due", Actor.SOURCE)
"""What went unannounced, until the invalidation that says so is acknowledged."""
BATCH = Variable("batch", Actor.SOURCE, Batch.DONE)

VARIABLES = (
    LOCK, REGION, COVERED, TURNING, BACKED, RECORD, CHANGING, REACHED, OLD, GOING, SERVING, KNOWN, MISTAKEN,
    PHASE, PAGE, WINDOW, RELIANCE, EXTENT, SEEN, SIGHT, OUTDATED, MISSEEN, NOTICE, OPENED, DUE, BATCH,
)  # fmt: skip

OPEN = OfAll(OPENED)
ONE = Parameter("page", most=1)
SOME = Parameter("pages")
FOUND = Parameter("found", may_be_empty=True)
KEPT = Parameter("kept", may_be_empty=True)

_LEAVE = (Put(PHASE, Phase.IDLE), Put(WINDOW, NOTHING), Put(EXTENT, NOTHING), Put(OUTDATED, NOTHING))
"""Every attempt is finished, however it went."""


def _stale(pages: Pages) -> tuple[Effect, ...]:
    """In one step attempts that rely on `pages` are stale, and what is known of them is forgotten."""
    return PutEach(RELIANCE, Reliance.STALE, (Meet(WINDOW, pages),)), Put(KNOWN, KNOWN - pages)


def _unseen(pages: Pages) -> Effect:
    """Nor is anything of what was seen learned, if it was of `pages`."""
    return PutEach(SIGHT, Reliance.STALE, (Meet(SEEN, pages),))


OF_A_CHANGE = frozenset({"change_regions", "exchange", "changed"})
"""The rows that replace regions by others."""
OF_MEMORY = frozenset({"learn", "recall"})
"""The rows about what is remembered of VMAs."""

TABLE: Table = {
    # ------------------------------------------------ a VP
    "resume": Row(  # one look: what is mapped is the answer, unless it is going
        Actor.VP, (ONE,),
        when=(Within(ONE, RECORD), Apart(ONE, CHANGING), Apart(ONE, GOING | SERVING)),
        then=(),
    ),
    "no_region": Row(
        Actor.VP, (ONE,),
        when=(Apart(ONE, REGION),),
        then=(),
    ),
    "begin": Row(
        Actor.VP, (ONE, SOME),
        when=(Is(PHASE, (Phase.IDLE,)), Within(ONE, SOME), Within(SOME, REGION), Apart(SOME, OPEN)),
        then=(
            Put(PHASE, Phase.RESOLVING), Put(PAGE, ONE), Put(WINDOW, SOME), Put(RELIANCE, Reliance.FRESH),
        ),
    ),
    "resolve": Row(
        Actor.VP, (FOUND,),
        when=(Is(PHASE, (Phase.RESOLVING,)), Within(FOUND, BACKED), Within(PAGE & BACKED, FOUND)),
        then=(
            Put(PHASE, Phase.RESOLVED), Put(EXTENT, FOUND & WINDOW),
            Put(SEEN, FOUND - OPEN), Put(SIGHT, Reliance.FRESH), Put(MISSEEN, NOTHING),
        ),
    ),
    "learn": Row(
        Actor.VP, (FOUND,),
        when=(Is(SIGHT, (Reliance.FRESH,)), Within(FOUND, SEEN)),
        then=(
            Put(KNOWN, KNOWN | FOUND), Put(MISTAKEN, (MISTAKEN - FOUND) | (FOUND & MISSEEN)),
        ),
    ),
    "recall": Row(  # instead of resolving: only a "yes" is remembered
        Actor.VP, (FOUND,),
        when=(Is(PHASE, (Phase.RESOLVING,)), Within(FOUND, WINDOW & KNOWN), Within(PAGE, FOUND)),
        then=(Put(PHASE, Phase.RESOLVED), Put(EXTENT, FOUND), Put(OUTDATED, FOUND & MISTAKEN)),
    ),
    "forward": Row(  # unbacked: a "no" can be stale, too
        Actor.VP, (),
        when=(Is(PHASE, (Phase.RESOLVED,)), Apart(PAGE, EXTENT), Is(RELIANCE, (Reliance.FRESH,))),
        then=_LEAVE,
    ),
    "give_up": Row(  # stale, contended or cancelled
        Actor.VP, (),
        when=(Is(PHASE, (Phase.RESOLVING, Phase.RESOLVED)),),
        then=_LEAVE,
    ),
    "commit": Row(  # having the lock and looking whether the attempt is stale are one step
        Actor.VP, (),
        when=(Meet(PAGE, EXTENT), Is(LOCK, (Lock.FREE,)), Is(RELIANCE, (Reliance.FRESH,))),
        then=(Put(LOCK, Lock.VP), Put(PHASE, Phase.MAPPING)),
    ),
    "map": Row(  # recorded first
        Actor.VP, (SOME,),
        when=(Is(PHASE, (Phase.MAPPING,)), Within(CHANGING, NOTHING), Within(SOME, EXTENT - RECORD)),
        then=(Put(RECORD, RECORD | SOME), Put(CHANGING, SOME)),
    ),
    "mapped": Row(
        Actor.VP, (),
        when=(Is(PHASE, (Phase.MAPPING,)),),
        then=(Put(REACHED, REACHED | CHANGING), Put(OLD, OLD | (CHANGING & OUTDATED))),
    ),
    "map_is_back": Row(
        Actor.VP, (),
        when=(Is(PHASE, (Phase.MAPPING,)), Within(CHANGING, REACHED)),
        then=(Put(CHANGING, NOTHING),),
    ),
    "finish": Row(
        Actor.VP, (),
        when=(Is(PHASE, (Phase.MAPPING,)), Within(CHANGING, NOTHING), Within(EXTENT, RECORD)),
        then=(Put(LOCK, Lock.FREE), *_LEAVE),
    ),
    # ------------------------------------------------ a source of invalidations
    "begin_invalidation": Row(
        Actor.SOURCE, (SOME,),
        when=(Is(NOTICE, (Notice.NONE,)),),
        then=(
            *_stale(SOME), _unseen(SOME),
            Put(NOTICE, Notice.BEGUN), Put(OPENED, SOME), Put(GOING, GOING | SOME), Put(BATCH, Batch.PENDING),
        ),
    ),
    "begin_is_acknowledged": Row(
        Actor.SOURCE, (),
        when=(Is(NOTICE, (Notice.BEGUN,)), Is(BATCH, (Batch.DONE,))),
        then=(Put(NOTICE, Notice.OPEN),),
    ),
    "change": Row(  # new memory, or none, behind pages that are open
        Actor.SOURCE, (FOUND,),
        when=(Is(NOTICE, (Notice.OPEN,)), Within(FOUND, OPENED)),
        then=(
            Put(BACKED, (BACKED - OPENED) | FOUND), Put(MISTAKEN, MISTAKEN | (KNOWN & OPENED)),
            PutEach(OUTDATED, OUTDATED | (EXTENT & OPENED)), PutEach(MISSEEN, MISSEEN | (SEEN & OPENED)),
        ),
    ),
    "end_invalidation": Row(  # before the acknowledgement if the connection closes
        Actor.SOURCE, (),
        when=(Is(NOTICE, (Notice.BEGUN, Notice.OPEN)),),
        then=(Put(NOTICE, Notice.NONE), Put(OPENED, NOTHING)),
    ),
    "vanish": Row(  # the other way: memory is unmapped first and announced later
        Actor.SOURCE, (SOME,),
        when=(Is(NOTICE, (Notice.NONE,)),),
        then=(
            Put(NOTICE, Notice.GONE), Put(DUE, SOME), Put(BACKED, BACKED - SOME),
            Put(OLD, OLD | (REACHED & SOME)), Put(MISTAKEN, MISTAKEN | (KNOWN & SOME)),
            PutEach(OUTDATED, OUTDATED | (EXTENT & SOME)), PutEach(MISSEEN, MISSEEN | (SEEN & SOME)),
        ),
    ),
    "tell": Row(
        Actor.SOURCE, (),
        when=(Is(NOTICE, (Notice.GONE,)),),
        then=(
            *_stale(DUE), _unseen(DUE),
            Put(NOTICE, Notice.TOLD), Put(GOING, GOING | DUE), Put(BATCH, Batch.PENDING),
        ),
    ),
    "telling_is_acknowledged": Row(
        Actor.SOURCE, (),
        when=(Is(NOTICE, (Notice.TOLD,)), Is(BATCH, (Batch.DONE,))),
        then=(Put(NOTICE, Notice.NONE), Put(DUE, NOTHING)),
    ),
    # ------------------------------------------------ a pass: the region manager's task, or a source's own
    "take": Row(  # having the lock and taking what is pending are one step
        Actor.MANAGER, (),
        when=(Is(LOCK, (Lock.FREE,)),),
        then=(
            Put(LOCK, Lock.MANAGER), Put(SERVING, GOING), Put(GOING, NOTHING),
            PutEach(BATCH, Batch.SERVING, (Is(BATCH, (Batch.PENDING,)),)),
        ),
    ),
    "take_away": Row(
        Actor.MANAGER, (SOME,),
        when=(Within(SOME, RECORD & SERVING),),  # only a pass has anything to serve
        then=(Put(CHANGING, SOME),),
    ),
    "taken_away": Row(
        Actor.MANAGER, (),
        when=(Is(LOCK, (Lock.MANAGER,)),),
        then=(Put(REACHED, REACHED - CHANGING), Put(OLD, OLD - CHANGING)),
    ),
    "take_away_is_back": Row(
        Actor.MANAGER, (),
        when=(Is(LOCK, (Lock.MANAGER,)), Apart(CHANGING, REACHED)),
        then=(Put(RECORD, RECORD - CHANGING), Put(CHANGING, NOTHING)),
    ),
    "served": Row(
        Actor.MANAGER, (),
        when=(Is(LOCK, (Lock.MANAGER,)), Apart(RECORD, SERVING)),
        then=(
            PutEach(BATCH, Batch.DONE, (Is(BATCH, (Batch.SERVING,)),)),
            Put(SERVING, NOTHING), Put(LOCK, Lock.FREE),
        ),
    ),
    # ------------------------------------------------ the VMM's connection
    "remove": Row(  # unlinked and stale before anything is unmapped
        Actor.VMM, (),
        when=(Is(LOCK, (Lock.FREE,)),),
        then=(
            Put(LOCK, Lock.REMOVER), *_stale(REGION), Put(REGION, NOTHING),
        ),
    ),
    "unmap": Row(
        Actor.VMM, (SOME,),
        when=(
            Either(Is(LOCK, (Lock.REMOVER,)), Within(SOME, TURNING)),
            Within(CHANGING, NOTHING), Within(SOME, RECORD),
        ),
        then=(Put(CHANGING, SOME),),
    ),
    "unmapped": Row(
        Actor.VMM, (),
        when=(Is(LOCK, (Lock.REMOVER, Lock.CHANGER)),),
        then=(Put(REACHED, REACHED - CHANGING), Put(OLD, OLD - CHANGING)),
    ),
    "unmap_is_back": Row(
        Actor.VMM, (),
        when=(Is(LOCK, (Lock.REMOVER, Lock.CHANGER)), Apart(CHANGING, REACHED)),
        then=(Put(RECORD, RECORD - CHANGING), Put(CHANGING, NOTHING)),
    ),
    "removed": Row(
        Actor.VMM, (),
        when=(Is(LOCK, (Lock.REMOVER,)), Within(RECORD, NOTHING)),
        then=(Put(LOCK, Lock.FREE),),
    ),
    "add": Row(
        Actor.VMM, (),
        when=(Is(LOCK, (Lock.FREE,)), Within(REGION, NOTHING)),
        then=(Put(REGION, EVERYTHING),),
    ),
    "change_regions": Row(
        Actor.VMM, (SOME, KEPT),
        when=(Is(LOCK, (Lock.FREE,)), Within(KEPT, REGION), Within(REGION - SOME, KEPT)),
        then=(Put(LOCK, Lock.CHANGER), Put(TURNING, SOME), Put(COVERED, KEPT)),
    ),
    "exchange": Row(  # the old regions out, the new ones in, and attempts stale, in one step
        Actor.VMM, (FOUND,),
        when=(Is(LOCK, (Lock.CHANGER,)), Apart(RECORD, TURNING), Within(COVERED, FOUND)),
        then=(*_stale(REGION), Put(REGION, FOUND)),
    ),
    "changed": Row(
        Actor.VMM, (),
        when=(Is(LOCK, (Lock.CHANGER,)), Apart(RECORD, TURNING)),
        then=(Put(LOCK, Lock.FREE), Put(TURNING, NOTHING), Put(COVERED, NOTHING)),
    ),
}  # fmt: skip
