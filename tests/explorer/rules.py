"""What must never be seen, whatever the schedule.

Owns the rules: each names the invariant of ARCHITECTURE.md that it watches, the hazards of the review that
break it (the letters and H-numbers of the design), and a sentence. Must not know who looks.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Rule(Enum):
    """`invariant`, `hazards`, `sentence`; the name is what the command line and the tables call it."""

    LEFT = ("I1", "H3 H4 k", "memory that the VMM had back is still in the guest's reach")
    LATE = ("I1", "e", "memory was put in the guest's reach after the VMM had it back")
    DANGLING = ("I1", "H3", "a pinned region whose memory went is mapped again")
    WAITED = ("I1", "", "an invalidation had to wait for a pass that could have served it")
    WRONG_FRAME = ("I2", "a c j", "a guest page reaches another frame than that of its own uaddr")
    EXTRAPOLATED = ("I2", "f", "a guest page reaches a frame where its VMA has none")
    LEFT_REGION = ("I2", "k", "a region was removed and its mappings were left")
    LATE_REGION = ("I2", "s", "a mapping was made in no region")
    EXCESS = ("I2", "h", "the guest has rights that region and VMA do not give")
    DISORDER = ("I3", "", "the region list is out of order, or a region wraps")
    WRAPPED = ("I3", "i", "a frame's number wrapped below zero")
    FORWARDED = ("I4", "g o", "an access was handed to the VMM to emulate, and that was never right")
    LATE_ANSWER = ("I4", "", "an intercept was not answered in time")
    STUCK = ("I4", "", "nobody can ever go on")
    SLEPT = ("I5", "H1 d", "somebody went to sleep with a lock held that does not allow it")
    REMAINS = ("I6", "", "something was left when the partition had ended")
    SPUN = ("I8", "l", "a VP was sent back to the same access without end")
    REMAPPED = ("I9", "H5 m", "what the guest has already was mapped once more")
    UNDONE = ("I9", "m", "one VP's call took away what another's had mapped")
    LIED = ("I10", "", "a VP was told to go on, and does not reach the page")
    UNKNOWN = ("I10", "", "what is recorded and what is reached differ")
    STRANDED = ("I10", "", "movable memory has neither a frame nor NO_ACCESS")
    TORN = ("core", "H6", "the region list was walked while it was being edited")
    FREED = ("core", "c s", "a region was used after it had been freed")
    BROKE = ("core", "", "the code ran into an error of its own")

    def __init__(self, invariant: str, hazards: str, sentence: str) -> None:
        self.invariant = invariant
        self.hazards = hazards
        self.sentence = sentence

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
