"""Logging: structlog on standard error, console for people, JSON for machines.

Owns the processors; must not know what is logged. Events are past-tense facts with fields; the partition and
the VP are bound to each line by whoever runs them (contextvars, which trio gives each task its own copy of).
Tracebacks come without local variables: those hold tokens.
"""

from __future__ import annotations

import logging
import os
import select
import sys
from contextlib import suppress
from typing import ClassVar

import structlog
from structlog.stdlib import ProcessorFormatter
from structlog.tracebacks import ExceptionDictTransformer
from structlog.typing import EventDict, Processor

from interceptd.config import Log

PIECE_BYTES = select.PIPE_BUF
"""What fits a pipe that poll calls writable: its smallest free room is a page."""


class StderrLogger:
    """Writes lines and never waits: one that cannot be written now (disk full, a reader that is gone or does
    not read) is dropped and counted, and the next one that is written says how many were.

    Only a terminal that somebody stopped by hand may hold a line up.
    """

    _dropped: ClassVar[int] = 0
    _torn: ClassVar[bool] = False

    def msg(self, line: str) -> None:
        start = "\n" if StderrLogger._torn else ""  # half a line is followed by no other
        data = f"{start}{line}\n".encode(errors="backslashreplace")
        written = _write(sys.stderr.fileno(), data)
        if written == len(data):
            StderrLogger._dropped, StderrLogger._torn = 0, False
        else:
            StderrLogger._dropped += 1
            StderrLogger._torn = StderrLogger._torn or written > 0

    debug = info = warning = error = critical = msg

    @staticmethod
    def tell_dropped(_: object, __: str, event: EventDict) -> EventDict:
        """A processor: what is missing before this line."""
        return {**event, "lines_dropped": StderrLogger._dropped} if StderrLogger._dropped else event


def _write(descriptor: int, data: bytes) -> int:
    """Write as much as goes without waiting; returns how many bytes."""
    poll = select.poll()
    poll.register(descriptor, select.POLLOUT)
    written = 0
    with suppress(OSError):
        while written < len(data) and poll.poll(0):
            written += os.write(descriptor, data[written : written + PIECE_BYTES])
    return written


def configure_logs(log: Log) -> None:
    """Set up structlog for the process, and let what libraries log come out the same way. May be repeated:
    loggers are not cached, so that the next line of each is as was said last."""
    as_json = log.format == "json" or (log.format == "auto" and not sys.stderr.isatty())
    level = logging.getLevelNamesMapping()[log.level.upper()]
    context: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        StderrLogger.tell_dropped,
    ]
    rendering = _json() if as_json else _console()
    structlog.configure(
        processors=[*context, *rendering],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=lambda *_: StderrLogger(),
        cache_logger_on_first_use=False,
    )
    libraries = _Libraries()
    libraries.setFormatter(
        ProcessorFormatter(
            foreign_pre_chain=context, processors=[ProcessorFormatter.remove_processors_meta, *rendering]
        )
    )
    logging.basicConfig(handlers=[libraries], level=level, force=True)


class _Libraries(logging.Handler):
    """Where the standard library's logging ends: trio says there that accept ran out of descriptors."""

    def emit(self, record: logging.LogRecord) -> None:
        StderrLogger().msg(self.format(record))


def _json() -> list[Processor]:
    tracebacks = structlog.processors.ExceptionRenderer(ExceptionDictTransformer(show_locals=False))
    return [tracebacks, structlog.processors.JSONRenderer()]


def _console() -> list[Processor]:
    return [
        structlog.dev.ConsoleRenderer(
            colors=sys.stderr.isatty(), exception_formatter=structlog.dev.plain_traceback
        )
    ]
