"""What a replay found: which answers were compared, and what was different.

Owns the counts and the first differences. Must not know how anything was repeated.
"""

from __future__ import annotations

from collections import Counter
from typing import Final

import msgspec

LISTED: Final = 10
"""Differences that are kept; the others are counted."""


class Difference(msgspec.Struct, frozen=True, kw_only=True):
    """`gfn` and `page` say where, as far as that is known; `page` is one of the VMM."""

    record: int
    time_ns: int
    vp_index: int | None = None
    gfn: int | None = None
    page: int | None = None
    what: str
    recorded: str
    replayed: str
    why: str = ""


class Verdict(msgspec.Struct, kw_only=True):
    """Of one replay."""

    intercepts: int = 0
    """Answered after a state was complete."""
    compared: int = 0
    equal: int = 0
    reordered: int = 0
    """Equal ones of which another VP's was answered first in the recording."""
    not_repeatable: Counter[str] = msgspec.field(default_factory=Counter)
    """Intercepts by the reason for which they are not compared."""
    unplaced: int = 0
    """Intercepts before the first state was complete, or between a gap and the next."""
    states: int = 0
    gaps: int = 0
    told_late: int = 0
    """Changes of live memory that a fault saw before the daemon was told."""
    difference_count: int = 0
    differences: list[Difference] = msgspec.field(default_factory=list)

    def differ(self, difference: Difference) -> None:
        self.difference_count += 1
        if len(self.differences) < LISTED:
            self.differences.append(difference)
