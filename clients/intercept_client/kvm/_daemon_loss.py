"""What becomes of the guest's memory when the daemon is gone.

Owns the policy, and carrying it out once. Must not know connections: the code that notices the loss calls
`lose`.

Without the daemon nothing reports that memory behind a memslot goes away. For MMIO that is unacceptable: a
device's window could by then cover memory that belongs to somebody else. RAM is the VMM's own and rarely
moves, and a guest cannot go on without it. So RAM stays, and what the VMM unmaps of it is unmapped from the
guest first (`GuestNotifier`).
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum

from intercept_protocol.addresses import PAGE_LIMIT, GfnRange
from intercept_protocol.errors import WireError
from intercept_protocol.messages import RegionKind

from ._guest_memory import GuestMemory

EVERYTHING = GfnRange(start=0, end=PAGE_LIMIT)
_KINDS_OF_RAM = frozenset((RegionKind.MOVABLE, RegionKind.PINNED))


class OnDaemonLoss(Enum):
    """What the guest keeps when the daemon is gone."""

    KEEP_RAM = "MMIO is unmapped, RAM stays"
    KEEP_NOTHING = "everything is unmapped"


@dataclass(slots=True, eq=False)
class RegionOfGuest:
    """A region that the daemon has, or may have. `kind` is what it may get until the daemon has answered."""

    gfns: GfnRange
    kind: RegionKind


@dataclass
class DaemonLoss:
    """Thread-safe. `on_lost` is called once, in the thread that noticed, after the memory was dealt with. If
    KVM refused to unmap some of it, the reason says so.
    """

    memory: GuestMemory
    policy: OnDaemonLoss
    on_lost: Callable[[str], None]
    why: str | None = None
    """Why the daemon counts as gone; None while it does not."""
    _regions: list[RegionOfGuest] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _is_expected: bool = False

    def region_added(self, gfns: GfnRange, presumed: RegionKind) -> RegionOfGuest:
        """Call it before asking the daemon, which may map some of it from then on."""
        region = RegionOfGuest(gfns, presumed)
        with self._lock:
            self._regions.append(region)
            self.memory.region_added(gfns)
        return region

    def region_refused(self, region: RegionOfGuest) -> None:
        """The daemon did not add it. Another region of the same gfns stays."""
        with self._lock:
            self._forget(region)

    def region_removed(self, gfns: GfnRange) -> None:
        """The daemon removed the region that has been there longest."""
        with self._lock:
            for region in self._regions:
                if region.gfns == gfns:
                    self._forget(region)
                    break

    def _forget(self, region: RegionOfGuest) -> None:
        if region in self._regions:
            self._regions.remove(region)
            self.memory.region_removed(region.gfns)

    def expect(self) -> None:
        """This VMM is leaving: from now on the end of a connection is not a loss."""
        with self._lock:
            self._is_expected = True

    def lose(self, why: str) -> None:
        """The daemon decides nothing any more. Returns when the guest reaches only what the policy leaves it,
        unless KVM refused: see `why`."""
        with self._lock:
            if self._is_expected or self.why is not None:
                return
            self.why = why
            gone = [EVERYTHING]
            if self.policy is OnDaemonLoss.KEEP_RAM:
                gone = [region.gfns for region in self._regions if region.kind not in _KINDS_OF_RAM]
            self.memory.freeze(why)
            try:
                self.memory.revoke(gone)
            except WireError as refused:  # only the VMM can do something about it: stop its guest
                self.why = f"{why}; the guest still reaches memory that it should not: {refused}"
        self.on_lost(self.why)
