"""Where log lines go, without blocking: standard error, or the systemd journal.

Owns the writing, and the count of lines that could not be written. Must not know how a line is rendered.
"""

from __future__ import annotations

import os
import select
import sys
from contextlib import suppress
from typing import ClassVar

from structlog.typing import EventDict

from interceptd.systemd.journald import Journal, Unreachable

PIECE_BYTES = select.PIPE_BUF
"""What a pipe that poll reports writable accepts without blocking: it then has at least a page free."""


class StderrLogger:
    """Writes lines without blocking. A line that cannot be written now (disk full, reader gone or not
    reading) is dropped; the next line that is written says how many were lost.

    Only a stopped terminal (Ctrl-S) can block it.
    """

    _dropped: ClassVar[int] = 0
    _cut_short: ClassVar[bool] = False
    """Whether the last output is a line without its end."""

    def msg(self, line: str) -> None:
        start = "\n" if StderrLogger._cut_short else ""
        data = f"{start}{line}\n".encode(errors="backslashreplace")
        written = _write(sys.stderr.fileno(), data)
        StderrLogger._cut_short = written < len(data) and (StderrLogger._cut_short or written > 0)
        self._count(is_written=written == len(data))

    debug = info = warning = error = critical = msg

    @staticmethod
    def _count(*, is_written: bool) -> None:
        StderrLogger._dropped = 0 if is_written else StderrLogger._dropped + 1

    @staticmethod
    def add_lines_dropped(_: object, __: str, event: EventDict) -> EventDict:
        """A processor: add how many lines are missing before this one."""
        return {**event, "lines_dropped": StderrLogger._dropped} if StderrLogger._dropped else event


class JournalLogger(StderrLogger):
    """Sends entries to the journal. One that it has no room for is dropped and counted. While it cannot be
    reached, `line` goes to standard error, where its priority stands in front of it."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal

    def entry(self, entry: bytes, line: str) -> None:
        try:
            self._count(is_written=self._journal.send(entry))
        except Unreachable:
            self.msg(line)

    debug = info = warning = error = critical = entry  # type: ignore[assignment]  # what its renderer returns


def _write(descriptor: int, data: bytes) -> int:
    """Write as much as possible without blocking; returns the number of bytes."""
    poll = select.poll()
    poll.register(descriptor, select.POLLOUT)
    written = 0
    with suppress(OSError):
        while written < len(data) and poll.poll(0):
            written += os.write(descriptor, data[written : written + PIECE_BYTES])
    return written
