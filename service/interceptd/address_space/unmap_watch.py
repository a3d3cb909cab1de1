"""The userfaultfd source: what the kernel reports as unmapped becomes an invalidation at once.

Owns reading the events. The munmap that made one is blocked until it is read, and its thread may hold a lock
that the VMM's hypervisor connection needs: so nothing is awaited here but the next event.
"""

from __future__ import annotations

from contextlib import suppress

import trio

from interceptd.address_space.userfaultfd import Userfaultfd
from interceptd.mmu_notifier import EVERYTHING, MmuNotifier
from interceptd.telemetry.counters import Source

DRAIN_READS = 64
"""Reads, of up to 64 events each, after which a drain gives up and calls every attempt stale."""
TURN_READS = 8
"""Reads before other tasks get a turn in an event storm."""
SPURIOUS_WAKE_SECONDS = 0.001
"""Pause after a wake-up without an event: a VMM that clears O_NONBLOCK makes poll(2) report errors without
end, and must not spin us."""


class UnmapWatch:
    def __init__(self, userfaultfd: Userfaultfd, notifier: MmuNotifier) -> None:
        self._userfaultfd = userfaultfd
        self._notifier = notifier

    async def run(self) -> None:
        """Read events until cancelled, or until there can be none any more: the mm is gone."""
        with suppress(OSError):
            while True:
                await trio.lowlevel.wait_readable(self._userfaultfd)
                if not self._read(TURN_READS) and self._userfaultfd.restore_nonblocking():
                    await trio.sleep(SPURIOUS_WAKE_SECONDS)

    def drain(self) -> None:
        """Take in all that was reported until now, synchronously. What is not known to be all makes every
        attempt stale."""
        try:
            complete = self._read(DRAIN_READS) < DRAIN_READS
        except OSError:  # which ends `run` as well
            complete = False
        if not complete:
            self._notifier.mark_stale(EVERYTHING)

    def _read(self, most: int) -> int:
        """How many reads brought events, up to `most`."""
        for count in range(most):
            events = self._userfaultfd.read_events()
            if not events:
                return count
            for uaddrs in events:
                self._notifier.invalidate(uaddrs, Source.USERFAULTFD)
        return most
