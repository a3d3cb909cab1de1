"""What one vCPU did, in numbers.

Owns the counters of a vCPU's loop; must not know how it runs. Only the vCPU's thread writes them; any
thread may read, but the numbers need not belong to one instant.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Final

from intercept_protocol.outcomes import AnyAnswer

FIRST_TOUCHES_KEPT: Final = 4096
"""Durations kept; later ones are only counted."""


@dataclass(slots=True)
class VcpuTally:
    exits: Counter[str] = field(default_factory=Counter)
    """By the name of the exit's type."""
    intercepts: Counter[AnyAnswer] = field(default_factory=Counter)
    completed: int = 0
    """Accesses completed on the VMM's memory."""
    forwarded: int = 0
    """Accesses that a device answered, or the bus where there is none."""
    replayed: int = 0
    """Locked instructions that were run again, because their memory was unmapped between read and write."""
    first_touches: list[float] = field(default_factory=list)
    """Seconds from the exit to being ready to run again, of accesses that were answered `mapped`."""

    def first_touch(self, seconds: float) -> None:
        if len(self.first_touches) < FIRST_TOUCHES_KEPT:
            self.first_touches.append(seconds)
