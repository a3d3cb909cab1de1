"""What must never happen, in any schedule.

Owns the rules: each names the invariant of ARCHITECTURE.md that it checks, or the statement of the protocol,
the hazards of the review that break it (the letters and H-numbers of the design), and a sentence. Must not
know how it is checked.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Rule(Enum):
    """`invariant`, `hazards`, `sentence`; the name is what the command line and the tables call it."""

    LEFT = ("I1", "H3 H4 k", "memory that the VMM got back is still within the guest's reach")
    LATE = ("I1", "e", "memory was mapped to the guest after the VMM got it back")
    DANGLING = ("I1", "H3", "a dangling pinned region is mapped again")
    WAITED = ("I1", "", "an invalidation had to wait for a pass that could have served it")
    WRONG_FRAME = ("I2", "a c j", "a guest page reaches a frame other than that of its uaddr")
    EXTRAPOLATED = ("I2", "f", "a guest page reaches a frame where its VMA has none")
    LEFT_REGION = ("I2", "k", "a region was removed but its mappings remain")
    LATE_REGION = ("I2", "s", "a mapping was made outside all regions")
    EXCESS = ("I2", "h", "the guest has rights that region and VMA do not give")
    DISORDER = ("I3", "", "the region list is out of order, or a region wraps")
    WRAPPED = ("I3", "i", "a frame's number wrapped below zero")
    FORWARDED = ("I4", "g o", "an access was forwarded to the VMM, which was never right")
    LATE_ANSWER = ("I4", "", "an intercept was not answered in time")
    STUCK = ("I4", "", "deadlock: no task can continue")
    SLEPT = ("I5", "H1 d", "a task slept while holding a lock that does not allow it")
    REMAINS = ("I6", "", "something was left after the partition ended")
    SPUN = ("I8", "l", "a VP was resumed at the same access forever")
    REMAPPED = ("I9", "H5 m", "a mapped page was mapped again")
    UNDONE = ("I9", "m", "one VP's call removed what another's had mapped")
    LIED = ("I10", "", "a VP was resumed, but does not reach the page")
    UNKNOWN = ("I10", "", "record and SLAT differ")
    STRANDED = ("I10", "", "movable memory has neither a frame nor NO_ACCESS")
    MIXED = ("P-34", "", "parts of the regions before and after a change are reached at the same time")
    DISTURBED = ("P-34", "", "a change of regions took away what it was to leave")
    UNPINNED = ("P-35", "", "pinned memory is not mapped, though it has not gone")
    UNLOGGED = ("I11", "", "the log says something other than what is")
    UNRECOVERED = ("I11", "", "a successor of the daemon would break a rule")
    TORN = ("core", "H6", "the region list was walked while it was being edited")
    FREED = ("core", "c s", "a region was used after it had been freed")
    BROKE = ("core", "", "the code raised an unexpected error")

    def __init__(self, invariant: str, hazards: str, sentence: str) -> None:
        self.invariant = invariant
        self.hazards = hazards
        self.sentence = sentence

    @property
    def is_of_recovery(self) -> bool:
        """Whether it is about the log and what a successor makes of it."""
        return self.invariant == "I11"

    @property
    def title(self) -> str:
        """Like `LEFT (I1; H3 H4 k)`."""
        return f"{self.name} ({'; '.join(part for part in (self.invariant, self.hazards) if part)})"


@dataclass(frozen=True, slots=True)
class Finding:
    """A rule that was broken, and how; `step` is the schedule's step in which it was seen."""

    rule: Rule
    how: str
    step: int
