"""The userfaultfd as an invalidation source: an unmap event becomes an invalidation at once.

Owns reading the events. The munmap behind one is blocked until it is read, and its thread may hold a lock
that the VMM's hypervisor connection needs, so nothing is awaited here but the next event and the uid's turn.
Must not know who serves the invalidations.
"""

from __future__ import annotations

from contextlib import suppress

import trio

from interceptd.address_space.userfaultfd import Userfaultfd
from interceptd.mmu_notifier import EVERYTHING, MmuNotifier
from interceptd.scheduling.time_share import give_way
from interceptd.telemetry.counters import Source

DRAIN_READS = 1024
"""Reads after which a drain gives up and makes every attempt stale."""
READS_PER_WAKE = 64
SPURIOUS_WAKE_SECONDS = 0.001
"""Pause after a wake-up without an event: a VMM that clears O_NONBLOCK makes poll(2) report errors forever,
which must not make the daemon spin."""


class UnmapWatch:
    def __init__(self, userfaultfd: Userfaultfd, notifier: MmuNotifier) -> None:
        self._userfaultfd = userfaultfd
        self._notifier = notifier

    async def run(self) -> None:
        """Read events until cancelled, or until the mm is gone."""
        with suppress(OSError):
            while True:
                await trio.lowlevel.wait_readable(self._userfaultfd)
                if not await self._read(READS_PER_WAKE) and self._userfaultfd.restore_nonblocking():
                    await trio.sleep(SPURIOUS_WAKE_SECONDS)

    async def drain(self) -> None:
        """Read everything reported so far. If there may be more, make every attempt stale."""
        try:
            complete = await self._read(DRAIN_READS) < DRAIN_READS
        except OSError:  # the mm is gone, which ends `run` too
            complete = False
        if not complete:
            self._notifier.mark_stale(EVERYTHING)

    def drain_nowait(self) -> bool:
        """Read once; whether nothing was reported. If the mm is gone, that is False too."""
        try:
            return not self._read_once()
        except OSError:
            return False

    async def _read(self, most: int) -> int:
        """Read up to `most` times; returns how many reads brought events."""
        for count in range(most):
            if not self._read_once():
                return count
            await give_way()
        return most

    def _read_once(self) -> bool:
        """Announce what one read brings; whether that was anything."""
        events = self._userfaultfd.read_events()
        if not events:
            return False
        for uaddrs in events:
            self._notifier.invalidate(uaddrs, Source.USERFAULTFD)
        self._userfaultfd.forget_event()
        return True
