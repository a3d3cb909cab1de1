"""The userfaultfd as an invalidation source: an unmap event becomes an invalidation at once.

Owns reading the events. The munmap behind one is blocked until it is read, and its thread may hold a lock
that the VMM's hypervisor connection needs, so nothing is awaited here but the next event and the uid's turn.
Must not know who serves the invalidations.
"""

from __future__ import annotations

from contextlib import suppress
from time import perf_counter_ns

import trio

from interceptd.address_space.userfaultfd import EVENTS_PER_READ, Userfaultfd
from interceptd.mmu_notifier import EVERYTHING, MmuNotifier
from interceptd.scheduling.time_share import give_way
from interceptd.telemetry.counters import Source

DRAIN_READS = 64
"""Reads after which a drain gives up and makes every attempt stale."""
READ_NS = 500_000
"""Nanoseconds. While reads are faster than this and bring all that is asked for, each asks for twice as many
events. Each event that is read wakes all threads that wait for theirs (userfaultfd_event_complete(),
fs/userfaultfd.c), so 64 events may take seconds."""
SPURIOUS_WAKE_SECONDS = 0.001
"""Pause after a wake-up without an event: a VMM that clears O_NONBLOCK makes poll(2) report errors forever,
which must not make the daemon spin."""


class UnmapWatch:
    def __init__(self, userfaultfd: Userfaultfd, notifier: MmuNotifier) -> None:
        self._userfaultfd = userfaultfd
        self._notifier = notifier
        self._at_once = 1

    async def run(self) -> None:
        """Read events until cancelled, or until the mm is gone."""
        with suppress(OSError):
            while True:
                await trio.lowlevel.wait_readable(self._userfaultfd)
                if not self._read() and self._userfaultfd.restore_nonblocking():
                    await trio.sleep(SPURIOUS_WAKE_SECONDS)
                await give_way()

    async def drain(self) -> None:
        """Read everything reported so far. If there may be more, make every attempt stale."""
        with suppress(OSError):  # the mm is gone, which ends `run` too
            for _ in range(DRAIN_READS):
                if not self._read():
                    return
                await give_way()
        self._notifier.mark_stale(EVERYTHING)

    def _read(self) -> bool:
        """Read once; returns whether there were events."""
        began = perf_counter_ns()
        events = self._userfaultfd.read_events(self._at_once)
        if len(events) < self._at_once or perf_counter_ns() - began > READ_NS:
            self._at_once = 1
        else:
            self._at_once = min(EVENTS_PER_READ, 2 * self._at_once)
        for uaddrs in events:
            self._notifier.invalidate(uaddrs, Source.USERFAULTFD)
        return bool(events)
