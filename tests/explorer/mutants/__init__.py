"""Mutants of the daemon's core: each removes one safeguard.

Owns their names. A mutant that no schedule detects points to a needless safeguard, or to a missing rule.
"""

from __future__ import annotations

from dataclasses import dataclass

from explorer.model_partition import Parts

from . import recovery
from .changes import (
    ExchangesUnmarked,
    ForgetsWhatWasPinned,
    KeepsNothing,
    KeepsTheRefused,
    KeepsWhateverTheRights,
    LetsFaultsThrough,
    MapsTheNewFirst,
    RemovesThenAdds,
    TrustsStaleWholes,
    WakesNobody,
)
from .known import (
    LearnsStale,
    LooksAtTheAttempt,
    LooksIntoOpenRanges,
    RemembersForEver,
    RemembersHoles,
)
from .others import (
    AcknowledgesEarly,
    DropsOverflow,
    EndsAllAtOnce,
    Extrapolates,
    ForgetsKicks,
    ForwardsWhenBusy,
    IgnoresOpenRanges,
    LeavesAttemptsFresh,
    NeverCutsBack,
    NeverGivesUp,
    ResolvesUnderTheLock,
    RollsBackToNothing,
    StaysFresh,
    TakesBeforeTheLock,
)
from .recovery import (
    AnnouncesNothingAgain,
    BelievesRights,
    BelievesStrays,
    LeavesGaps,
    RecordsDoneFirst,
    RecordsNoDangling,
    RecordsNothingGone,
    RecordsNoUnmaps,
    RecordsServedEarly,
    ReopensNothing,
)
from .regions import (
    AcceptsOverlaps,
    BelievesStaleNo,
    CommitsStale,
    ForgetsAliases,
    ForgetsDangling,
    ForgetsNoAccess,
    GivesAllRights,
    HidesNothing,
    MapsTheWhole,
    NeverFinishes,
    RecordsAfterwards,
    UnlinksFirst,
    UnmapsNothing,
)


@dataclass(frozen=True)
class Mutant:
    """`parts` are those of the daemon, with one replaced."""

    about: str
    parts: Parts
    is_of_recovery: bool = False
    """Whether it is the log that shows it, or what a successor makes of that: else a rule must that is about
    the running partition."""


def _mutant(parts: Parts, faulty: type[object]) -> Mutant:
    about = (faulty.__doc__ or "").strip()
    return Mutant(about, parts, is_of_recovery=faulty.__module__ == recovery.__name__)


MUTANTS = {
    "staleness-at-commit": _mutant(Parts(regions=CommitsStale), CommitsStale),
    "staleness-of-no": _mutant(Parts(regions=BelievesStaleNo), BelievesStaleNo),
    "stale-marks": _mutant(Parts(notifier=StaysFresh), StaysFresh),
    "window-cut-back": _mutant(Parts(notifier=NeverCutsBack), NeverCutsBack),
    "waiting-for-open-ranges": _mutant(Parts(notifier=IgnoresOpenRanges), IgnoresOpenRanges),
    "counted-begins": _mutant(Parts(notifier=EndsAllAtOnce), EndsAllAtOnce),
    "gaps-only": _mutant(Parts(mappings=MapsTheWhole), MapsTheWhole),
    "record-before-call": _mutant(Parts(mappings=RecordsAfterwards), RecordsAfterwards),
    "being-mapped-slot": _mutant(Parts(mappings=HidesNothing), HidesNothing),
    "unlink-and-unmap-at-once": _mutant(Parts(regions=UnlinksFirst), UnlinksFirst),
    "stale-on-remove": _mutant(Parts(notifier=LeavesAttemptsFresh), LeavesAttemptsFresh),
    "change-in-one-step": _mutant(Parts(regions=RemovesThenAdds), RemovesThenAdds),
    "old-before-new": _mutant(Parts(regions=MapsTheNewFirst), MapsTheNewFirst),
    "kept-mappings": _mutant(Parts(regions=KeepsNothing), KeepsNothing),
    "kept-rights": _mutant(Parts(regions=KeepsWhateverTheRights), KeepsWhateverTheRights),
    "change-waits": _mutant(Parts(regions=LetsFaultsThrough), LetsFaultsThrough),
    "stale-on-change": _mutant(Parts(notifier=ExchangesUnmarked), ExchangesUnmarked),
    "fresh-pinned-on-change": _mutant(Parts(regions=TrustsStaleWholes), TrustsStaleWholes),
    "regions-on-refusal": _mutant(Parts(regions=KeepsTheRefused), KeepsTheRefused),
    "pinned-on-refusal": _mutant(Parts(mappings=ForgetsWhatWasPinned), ForgetsWhatWasPinned),
    "woken-on-change": _mutant(Parts(mappings=WakesNobody), WakesNobody),
    "unmap-on-invalidation": _mutant(Parts(regions=UnmapsNothing), UnmapsNothing),
    "acknowledge-after-unmap": _mutant(Parts(notifier=AcknowledgesEarly), AcknowledgesEarly),
    "pending-after-lock": _mutant(Parts(notifier=TakesBeforeTheLock), TakesBeforeTheLock),
    "everything-on-overflow": _mutant(Parts(notifier=DropsOverflow), DropsOverflow),
    "disjoint-regions": _mutant(Parts(regions=AcceptsOverlaps), AcceptsOverlaps),
    "aliases": _mutant(Parts(regions=ForgetsAliases), ForgetsAliases),
    "clamp-to-vma": _mutant(Parts(address_space=Extrapolates), Extrapolates),
    "rights-of-the-vma": _mutant(Parts(regions=GivesAllRights), GivesAllRights),
    "retry-when-busy": _mutant(Parts(faults=ForwardsWhenBusy), ForwardsWhenBusy),
    "no-lock-across-resolve": _mutant(Parts(faults=ResolvesUnderTheLock), ResolvesUnderTheLock),
    "finished-attempts": _mutant(Parts(regions=NeverFinishes), NeverFinishes),
    "dangling-mark": _mutant(Parts(regions=ForgetsDangling), ForgetsDangling),
    "no-access-on-invalidation": _mutant(Parts(mappings=ForgetsNoAccess), ForgetsNoAccess),
    "no-access-on-roll-back": _mutant(Parts(hypervisor=RollsBackToNothing), RollsBackToNothing),
    "known-forgotten": _mutant(Parts(known=RemembersForEver), RemembersForEver),
    "known-if-fresh": _mutant(Parts(regions=LearnsStale), LearnsStale),
    "known-if-all-is-fresh": _mutant(Parts(regions=LooksAtTheAttempt), LooksAtTheAttempt),
    "known-outside-open-ranges": _mutant(Parts(regions=LooksIntoOpenRanges), LooksIntoOpenRanges),
    "known-yes-only": _mutant(Parts(faults=RemembersHoles), RemembersHoles),
    "progress-guard": _mutant(Parts(processor=NeverGivesUp), NeverGivesUp),
    "kept-kick": _mutant(Parts(processor=ForgetsKicks), ForgetsKicks),
    "gone-recorded": _mutant(Parts(log=RecordsNothingGone), RecordsNothingGone),
    "served-recorded-late": _mutant(Parts(notifier=RecordsServedEarly), RecordsServedEarly),
    "done-recorded-late": _mutant(Parts(log=RecordsDoneFirst), RecordsDoneFirst),
    "unmaps-recorded": _mutant(Parts(hypervisor=RecordsNoUnmaps), RecordsNoUnmaps),
    "dangling-recorded": _mutant(Parts(regions=RecordsNoDangling), RecordsNoDangling),
    "strays-set-aside": _mutant(Parts(regions=BelievesStrays), BelievesStrays),
    "excess-set-aside": _mutant(Parts(regions=BelievesRights), BelievesRights),
    "gaps-closed": _mutant(Parts(regions=LeavesGaps), LeavesGaps),
    "open-ranges-reopened": _mutant(Parts(notifier=ReopensNothing), ReopensNothing),
    "gone-announced-again": _mutant(Parts(notifier=AnnouncesNothingAgain), AnnouncesNothingAgain),
}
