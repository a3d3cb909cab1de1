"""The daemon's core with one mend taken out at a time: is it missed?

Owns the names. A mend that nobody misses is either not needed or not looked for.
"""

from __future__ import annotations

from dataclasses import dataclass

from explorer.model_partition import Parts

from .others import (
    AcknowledgesEarly,
    DropsOverflow,
    EndsAllAtOnce,
    Extrapolates,
    ForgetsKicks,
    IgnoresOpenRanges,
    LeavesAttemptsFresh,
    NeverCutsBack,
    NeverGivesUp,
    ResolvesUnderTheLock,
    RollsBackToNothing,
    StaysFresh,
    TakesBeforeTheLock,
)
from .regions import (
    AcceptsOverlaps,
    BelievesStaleNo,
    CommitsStale,
    ForgetsAliases,
    ForgetsDangling,
    ForgetsNoAccess,
    ForwardsWhenBusy,
    GivesAllRights,
    HidesNothing,
    MapsTheWhole,
    NeverFinishes,
    RecordsAfterwards,
    UnlinksFirst,
    UnmapsNothing,
)


@dataclass(frozen=True)
class Mend:
    """`parts` are the daemon's, with this mend taken out."""

    about: str
    parts: Parts


def _without(parts: Parts, culprit: type[object]) -> Mend:
    about = (culprit.__doc__ or "").strip()
    return Mend(about, parts)


MENDS = {
    "staleness-at-commit": _without(Parts(regions=CommitsStale), CommitsStale),
    "staleness-of-no": _without(Parts(regions=BelievesStaleNo), BelievesStaleNo),
    "stale-marks": _without(Parts(notifier=StaysFresh), StaysFresh),
    "window-cut-back": _without(Parts(notifier=NeverCutsBack), NeverCutsBack),
    "waiting-for-open-ranges": _without(Parts(notifier=IgnoresOpenRanges), IgnoresOpenRanges),
    "counted-begins": _without(Parts(notifier=EndsAllAtOnce), EndsAllAtOnce),
    "gaps-only": _without(Parts(mappings=MapsTheWhole), MapsTheWhole),
    "record-before-call": _without(Parts(mappings=RecordsAfterwards), RecordsAfterwards),
    "being-mapped-slot": _without(Parts(mappings=HidesNothing), HidesNothing),
    "unlink-and-unmap-at-once": _without(Parts(regions=UnlinksFirst), UnlinksFirst),
    "stale-on-remove": _without(Parts(notifier=LeavesAttemptsFresh), LeavesAttemptsFresh),
    "unmap-on-invalidation": _without(Parts(regions=UnmapsNothing), UnmapsNothing),
    "acknowledge-after-unmap": _without(Parts(notifier=AcknowledgesEarly), AcknowledgesEarly),
    "pending-after-lock": _without(Parts(notifier=TakesBeforeTheLock), TakesBeforeTheLock),
    "everything-on-overflow": _without(Parts(notifier=DropsOverflow), DropsOverflow),
    "disjoint-regions": _without(Parts(regions=AcceptsOverlaps), AcceptsOverlaps),
    "aliases": _without(Parts(regions=ForgetsAliases), ForgetsAliases),
    "clamp-to-vma": _without(Parts(address_space=Extrapolates), Extrapolates),
    "rights-of-the-vma": _without(Parts(regions=GivesAllRights), GivesAllRights),
    "retry-when-busy": _without(Parts(regions=ForwardsWhenBusy), ForwardsWhenBusy),
    "no-lock-across-resolve": _without(Parts(path=ResolvesUnderTheLock), ResolvesUnderTheLock),
    "finished-attempts": _without(Parts(regions=NeverFinishes), NeverFinishes),
    "dangling-mark": _without(Parts(regions=ForgetsDangling), ForgetsDangling),
    "no-access-on-invalidation": _without(Parts(mappings=ForgetsNoAccess), ForgetsNoAccess),
    "no-access-on-roll-back": _without(Parts(hypervisor=RollsBackToNothing), RollsBackToNothing),
    "progress-guard": _without(Parts(processor=NeverGivesUp), NeverGivesUp),
    "kept-kick": _without(Parts(processor=ForgetsKicks), ForgetsKicks),
}
