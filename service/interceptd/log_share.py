"""One uid's share of the log: what its clients cause must neither fill the disk nor drown other lines.

Owns the account of bytes, and for whom each task works. A task that serves a client charges its lines to the
client's uid, and so do the tasks that it starts (contextvars). The lines of other tasks, the daemon's own,
are always written. Must not know what is logged, nor how it is written: `logs` asks and charges.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextvars import ContextVar
from enum import Enum
from typing import Final

BYTES_PER_SECOND: Final = 2048
"""In the long run, ten lines or 180 MB a day; of warnings as much again, and of failures."""
BURST_SECONDS: Final = 32.0
"""How much of that a quiet uid may write at once: 64 KiB, the created and ended lines of 128 partitions."""
TEXT_LENGTH: Final = 300
"""The most characters of a text in a line that a client caused: the text may be the client's own."""


class Severity(Enum):
    """Each has an account of its own, so that ordinary lines drown neither warnings nor failures."""

    ORDINARY = "ordinary"
    WARNING = "warning"
    """A limit that is reached, a request that daemons die of."""
    FAILURE = "failure"
    """Levels error and critical: the loss of a partition, a broken session."""


class LogShare:
    """Of one uid; without `uid`, of the clients that have none. `clock` is in seconds.

    Each line is charged after it was written, by its length (the generic cell rate algorithm, ITU-T I.371): a
    long one is paid for by those that follow.
    """

    def __init__(self, uid: int | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self.uid = uid
        self._clock = clock
        self._paid_until = dict.fromkeys(Severity, 0.0)
        self._not_logged = 0

    def admit(self, severity: Severity) -> bool:
        """Whether a line may be written now. One that may not is counted."""
        if self._paid_until[severity] < self._clock() + BURST_SECONDS:
            return True
        self._not_logged += 1
        return False

    def charge(self, severity: Severity, size: int) -> None:
        """A line of `size` bytes was written."""
        begin = max(self._paid_until[severity], self._clock())
        self._paid_until[severity] = begin + size / BYTES_PER_SECOND

    def take_not_logged(self) -> int:
        """How many lines were not written since the last call: the next line says it."""
        taken, self._not_logged = self._not_logged, 0
        return taken

    @property
    def idle(self) -> bool:
        """Whether the whole burst is there again."""
        return max(self._paid_until.values()) <= self._clock()


_SHARE: ContextVar[LogShare | None] = ContextVar("log_share", default=None)


def charge_lines_to(share: LogShare | None) -> None:
    """Charge the lines of this task, and of the tasks that it starts from now on, to `share`. With None they
    are always written: an operator's."""
    _SHARE.set(share)


def current_share() -> LogShare | None:
    """The share of the running task; None for the daemon's own tasks and for an operator's."""
    return _SHARE.get()
