"""Counters of what happened so far.

Owns the counters that the live view reads while the exercise runs, and the findings; must not know what is
right. Findings beyond the first few are only counted.
"""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final

from intercept_protocol.outcomes import Answer, AnyAnswer

from .clock import During

FINDINGS_KEPT: Final = 20
EVENTS_KEPT: Final = 8


class Wrong(StrEnum):
    """Faults of a daemon. The first two are stale reads."""

    UNTRUE_ANSWER = "untrue answer"
    """The answer was true at no instant between request and reply."""
    UNTRUE_SIGHT = "stale frame"
    """A guest reached a frame, or had a right, that it must not have."""
    LOST = "lost mapping"
    """A guest was resumed, nothing was revoked, and it reached nothing."""
    FAILED = "failed"
    """The answer was FAIL, for which the exercise gives no cause."""
    MISJUDGED = "wrong refusal"
    """A region that should have been added was refused, or the other way round."""
    MISCOUNTED = "miscounted"
    """The numbers of intercepts sent, answered and counted by the daemon differ."""
    UNCAUSED = "retry without a cause"
    """Of the restarted daemon without a restart, or of a kick without a kick."""
    RESTARTED = "unexpected restart"
    """The daemon ended, or the partition survived, another number of times than it was killed."""
    LEFT_OPEN = "left open"
    """Every begin was ended, and the daemon has one open: it carried it out twice."""


STALE = frozenset({Wrong.UNTRUE_ANSWER, Wrong.UNTRUE_SIGHT})


@dataclass(frozen=True, slots=True)
class Finding:
    """A counterexample."""

    wrong: Wrong
    who: str
    gfn: int | None
    told: str
    possible: tuple[str, ...]
    during: During


@dataclass(slots=True)
class VpTally:
    intercepts: int = 0
    last: AnyAnswer | None = None
    kicks: int = 0
    """How often it may yet be answered `kicked`; several kicks may come as one."""


@dataclass(slots=True)
class Tally:
    vps: list[VpTally]
    answers: Counter[AnyAnswer] = field(default_factory=Counter)
    steps: int = 0
    looks: int = 0
    """How often a guest's view of a page was compared with the truth."""
    wrongs: Counter[Wrong] = field(default_factory=Counter)
    findings: list[Finding] = field(default_factory=list)
    events: deque[str] = field(default_factory=lambda: deque(maxlen=EVENTS_KEPT))

    def answered(self, vp_index: int, answer: AnyAnswer) -> None:
        vp = self.vps[vp_index]
        vp.intercepts += 1
        vp.last = answer
        vp.kicks -= answer is Answer.KICKED
        self.answers[answer] += 1

    def found(self, finding: Finding) -> None:
        self.wrongs[finding.wrong] += 1
        if len(self.findings) < FINDINGS_KEPT:
            self.findings.append(finding)

    def kicked(self, vp_index: int | None) -> None:
        """One VP may be answered `kicked` once more, or all for None."""
        for vp in self.vps if vp_index is None else (self.vps[vp_index],):
            vp.kicks += 1

    @property
    def stale_reads(self) -> int:
        return sum(self.wrongs[wrong] for wrong in STALE)
