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
from intercept_protocol.messages import RegionKind

from ._guest_memory import GuestMemory

EVERYTHING = GfnRange(start=0, end=PAGE_LIMIT)
_KINDS_OF_RAM = frozenset((RegionKind.MOVABLE, RegionKind.PINNED))


class OnDaemonLoss(Enum):
    """What the guest keeps when the daemon is gone."""

    KEEP_RAM = "MMIO is unmapped, RAM stays"
    KEEP_NOTHING = "everything is unmapped"


@dataclass
class DaemonLoss:
    """Thread-safe. `on_lost` is called once, in the thread that noticed, once the policy was carried out."""

    memory: GuestMemory
    policy: OnDaemonLoss
    on_lost: Callable[[str], None]
    why: str | None = None
    """Why the daemon counts as gone; None while it does not."""
    _kinds: dict[GfnRange, RegionKind] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _is_expected: bool = False

    def region_added(self, gfns: GfnRange, kind: RegionKind) -> None:
        """Call it before asking the daemon, and again with the kind that the daemon chose."""
        with self._lock:
            self._kinds[gfns] = kind

    def region_removed(self, gfns: GfnRange) -> None:
        with self._lock:
            self._kinds.pop(gfns, None)

    def expect(self) -> None:
        """This VMM is leaving: from now on the end of a connection is not a loss."""
        with self._lock:
            self._is_expected = True

    def lose(self, why: str) -> None:
        """The daemon is gone. Returns when the guest reaches only what the policy leaves it."""
        with self._lock:
            if self._is_expected or self.why is not None:
                return
            self.why = why
            gone = [EVERYTHING]
            if self.policy is OnDaemonLoss.KEEP_RAM:
                gone = [gfns for gfns, kind in self._kinds.items() if kind not in _KINDS_OF_RAM]
            self.memory.freeze(why)
            for gfns in gone:
                self.memory.unmap(gfns)
        self.on_lost(why)
