"""Follows a restore that the daemon carries out, to its end or to Ctrl-C.

Owns when the daemon and the ring are looked at, and what a change of daemons means. Must not know options,
nor how progress is shown.
"""

from __future__ import annotations

import errno
import time
from collections.abc import Callable
from typing import Final

from intercept_client import BlockingVmm, RestoreState, RestoreStatistics, WireError
from interceptctl import operator_client

from .recording import Recording

PAUSE: Final = 0.05
"""Seconds between two looks at the ring."""
LOOKS: Final = 5
"""At the ring, for each question to the daemon."""


class Following:
    """Of one restore. `show` is called with each answer of the daemon, and `say` with what else happens."""

    def __init__(
        self,
        partition_id: int,
        recording: Recording | None,
        show: Callable[[RestoreStatistics], None],
        say: Callable[[str], None],
    ) -> None:
        self.last: RestoreStatistics | None = None
        self.interrupted = False
        self.restarted = False
        """Whether the daemon that was asked first, and writes the trace, is gone."""
        self.away = False
        """Whether there is no daemon now."""
        self._partition_id = partition_id
        self._recording = recording
        self._traced = 0
        """How many records there were just before the daemon was last asked."""
        self._show = show
        self._say = say

    def interrupt(self) -> None:
        """Stop soon. For a signal handler."""
        self.interrupted = True

    def follow(self, vmm: BlockingVmm) -> None:
        """Return at the end of the restore, or once interrupted. Raises as `BlockingVmm.call` does."""
        while not self.interrupted:
            now = self._ask(vmm)
            self._show(now)
            if now.state == RestoreState.ENDED:
                break
            for _ in range(LOOKS):
                self._drain()
                if not self.interrupted:
                    time.sleep(PAUSE)

    def wait(self, seconds: float) -> bool:
        """Let the daemon's successor start; False to give up."""
        self.restarted = self.away = True
        self._say("the daemon went away; waiting for the next")
        time.sleep(seconds)
        return not self.interrupted

    def _ask(self, vmm: BlockingVmm) -> RestoreStatistics:
        traced = self._records()
        try:
            now = vmm.restore_progress(self._partition_id)
        except WireError as refusal:
            if refusal.number != errno.ENOENT:
                raise
            raise self._forgotten() from refusal
        if self.last is not None:
            if self.last.pid not in {0, now.pid} or self.last.image_pages != now.image_pages:
                raise self._forgotten()  # a daemon that began anew gave its number to another
            if now.faults < self.last.faults or self._lacks_records(now.faults - self.last.faults):
                self.restarted = True
        self.last, self.away, self._traced = now, False, traced
        return now

    def _lacks_records(self, faults: int) -> bool:
        """Whether none was written of so many faults since the daemon was last asked."""
        return self._recording is not None and faults > 0 and self._records() == self._traced

    def _records(self) -> int:
        return 0 if self._recording is None else self._recording.ring.written

    def _forgotten(self) -> operator_client.Refused:
        return operator_client.Refused(
            f"the daemon knows nothing of partition {self._partition_id} any more: it was started anew, "
            "without a keeper. A VMM that still runs waits for ever at its first missing page: kill it"
        )

    def _drain(self) -> None:
        if self._recording is not None:
            self._recording.drain()
