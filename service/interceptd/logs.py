"""Logging: structlog on standard error, console for people, JSON for machines.

Owns the processors; must not know what is logged. Events are past-tense facts with fields. The task of a
partition or VP binds its id to each line (contextvars: trio gives each task its own copy). Tracebacks omit
local variables, which may hold tokens. Text from outside is escaped: an event stays on one line and cannot
control the terminal.
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
        if written == len(data):
            StderrLogger._dropped, StderrLogger._cut_short = 0, False
        else:
            StderrLogger._dropped += 1
            StderrLogger._cut_short = StderrLogger._cut_short or written > 0

    debug = info = warning = error = critical = msg

    @staticmethod
    def add_lines_dropped(_: object, __: str, event: EventDict) -> EventDict:
        """A processor: add how many lines are missing before this one."""
        return {**event, "lines_dropped": StderrLogger._dropped} if StderrLogger._dropped else event


def _write(descriptor: int, data: bytes) -> int:
    """Write as much as possible without blocking; returns the number of bytes."""
    poll = select.poll()
    poll.register(descriptor, select.POLLOUT)
    written = 0
    with suppress(OSError):
        while written < len(data) and poll.poll(0):
            written += os.write(descriptor, data[written : written + PIECE_BYTES])
    return written


def configure_logs(log: Log) -> None:
    """Set up structlog for the process and route the standard library's logging through it. May be called
    again: loggers are not cached, so each follows from its next line."""
    as_json = log.format == "json" or (log.format == "auto" and not sys.stderr.isatty())
    level = logging.getLevelNamesMapping()[log.level.upper()]
    context: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        StderrLogger.add_lines_dropped,
    ]
    rendering = _json() if as_json else _console()
    structlog.configure(
        processors=[*context, *rendering],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=lambda *_: StderrLogger(),
        cache_logger_on_first_use=False,
    )
    handler = _LibraryHandler()
    handler.setFormatter(
        ProcessorFormatter(
            foreign_pre_chain=context, processors=[ProcessorFormatter.remove_processors_meta, *rendering]
        )
    )
    logging.basicConfig(handlers=[handler], level=level, force=True)


class _LibraryHandler(logging.Handler):
    """Writes what libraries log, e.g. trio when accept runs out of descriptors."""

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
    """A processor. The console escapes no value without blanks; lone surrogates stop JSON readers."""
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
