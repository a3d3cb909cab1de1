"""Logging: structlog on standard error, console for people, JSON for machines.

Owns the processors; must not know what is logged. Events are past-tense facts with fields; the partition and
the VP are bound to each line by whoever runs them (contextvars, which trio gives each task its own copy of).
Tracebacks come without local variables: those hold tokens. What came from outside is made visible: an event
stays one line, and does nothing to the terminal that shows it.
"""

from __future__ import annotations

import logging
import os
import select
import sys
from contextlib import suppress
from io import StringIO
from typing import ClassVar, TextIO

import structlog
from structlog.stdlib import ProcessorFormatter
from structlog.tracebacks import ExceptionDictTransformer
from structlog.typing import EventDict, ExcInfo, Processor

from intercept_protocol.text import visible, visible_lines
from interceptd.config.schema import Log

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
    return [tracebacks, _make_visible, structlog.processors.JSONRenderer()]


def _console() -> list[Processor]:
    return [
        _make_visible,
        structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty(), exception_formatter=_write_traceback),
    ]


def _make_visible(_: object, __: str, event: EventDict) -> EventDict:
    """A processor. The console prints a value without blanks as it is; a lone surrogate in JSON stops many
    readers."""
    return {key: _visible(value) for key, value in event.items()}


def _visible(value: object) -> object:
    match value:
        case str():
            return visible(value)
        case list() | tuple():
            return [_visible(item) for item in value]
        case dict():
            return {key: _visible(item) for key, item in value.items()}
        case _:
            return value


def _write_traceback(to: TextIO, exc_info: ExcInfo) -> None:
    text = StringIO()
    structlog.dev.plain_traceback(text, exc_info)
    to.write(visible_lines(text.getvalue()))
