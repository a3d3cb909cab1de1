"""Logging: structlog on standard error, console for people, JSON for machines.

Owns the processors; must not know what is logged. Events are past-tense facts with fields. The task of a
partition or VP binds its id to each line (contextvars: trio gives each task its own copy). Tracebacks omit
local variables, which may hold tokens. Text from outside is escaped: an event stays on one line and cannot
control the terminal. A line that a client caused names the client's uid, takes its place in the share of that
uid, and has its texts cut; one beyond the share is counted in `not_logged` of the next (`log_share`).
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
from structlog import DropEvent
from structlog.stdlib import ProcessorFormatter
from structlog.tracebacks import ExceptionDictTransformer
from structlog.typing import EventDict, ExcInfo, Processor

from intercept_protocol.text import visible
from interceptd.config.schema import Log
from interceptd.log_share import TEXT_LENGTH, Severity, current_share

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
    level = logging.getLevelNamesMapping()[log.level.upper()]
    rendering = _rendering(log)
    structlog.configure(
        processors=processors(log),
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=lambda *_: StderrLogger(),
        cache_logger_on_first_use=False,
    )
    handler = _LibraryHandler()
    handler.setFormatter(
        ProcessorFormatter(
            foreign_pre_chain=_CONTEXT, processors=[ProcessorFormatter.remove_processors_meta, *rendering]
        )
    )
    logging.basicConfig(handlers=[handler], level=level, force=True)


def processors(log: Log) -> list[Processor]:
    """What a line passes through, from its event and fields to its text."""
    return [_take_place, *_CONTEXT, *_rendering(log), _charge]


class _LibraryHandler(logging.Handler):
    """Writes what libraries log, e.g. trio when accept runs out of descriptors."""

    def emit(self, record: logging.LogRecord) -> None:
        StderrLogger().msg(self.format(record))


_CONTEXT: list[Processor] = [
    structlog.contextvars.merge_contextvars,
    structlog.processors.add_log_level,
    structlog.processors.TimeStamper(fmt="iso", utc=True),
    StderrLogger.add_lines_dropped,
]


def _take_place(_: object, method: str, event: EventDict) -> EventDict:
    """A processor: drop a line that is beyond its task's share, and count it."""
    share = current_share()
    if share is None:
        return event
    if not share.admit(_severity(method)):
        raise DropEvent
    if not_logged := share.take_not_logged():
        event["not_logged"] = not_logged
    if share.uid is not None:
        event.setdefault("uid", share.uid)
    return event


def _charge(_: object, method: str, line: object) -> str:
    """The last processor: charge the line to its task's share."""
    assert isinstance(line, str), "it is rendered"
    share = current_share()
    if share is not None:
        share.charge(_severity(method), len(line.encode(errors="backslashreplace")))
    return line


def _severity(method: str) -> Severity:
    return Severity.FAILURE if method in {"error", "exception", "critical"} else Severity.ORDINARY


def _rendering(log: Log) -> list[Processor]:
    as_json = log.format == "json" or (log.format == "auto" and not sys.stderr.isatty())
    return _json() if as_json else _console()


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
            return visible(_cut(value))
        case list() | tuple():
            return [_visible(item) for item in value]
        case dict():
            return {key: _visible(item) for key, item in value.items()}
        case _:
            return value


def _write_traceback(to: TextIO, exc_info: ExcInfo) -> None:
    text = StringIO()
    structlog.dev.plain_traceback(text, exc_info)
    to.write("\n".join(visible(_cut(line)) for line in text.getvalue().split("\n")))


def _cut(text: str) -> str:
    """`text`, cut if a client may have chosen it."""
    if len(text) <= TEXT_LENGTH or current_share() is None:
        return text
    return f"{text[: TEXT_LENGTH - 3]}..."
