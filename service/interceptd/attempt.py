"""The two ways in which an intercept is not decided yet: it is being tried, or it has to wait.

Owns these values; must not know who makes them.
"""

from __future__ import annotations

from dataclasses import dataclass

import trio

from intercept_protocol.outcomes import Access, Answer
from interceptd.mmu_notifier import Window
from interceptd.region import Region


@dataclass(frozen=True, slots=True)
class Attempt:
    """One VP's optimistic section over a window of uaddrs, from `begin` to `finish`."""

    region: Region
    gfn: int
    access: Access
    window: Window

    @property
    def uaddr_page(self) -> int:
        return self.gfn - self.region.gfns.start + self.region.uaddrs.start

    @property
    def stale(self) -> bool:
        return self.window.stale


@dataclass(frozen=True, slots=True)
class Obstacle:
    """The page is in somebody's hands: wait for `over`, and look again; give up with `answer`."""

    over: trio.Event
    answer: Answer
