"""Logging: structlog, as console lines for people, JSON for machines, or entries of the systemd journal.

Owns the processors; must not know what is logged, nor how it is written (`output`). Events are past-tense
facts with fields. A task that serves a client binds the pid and uid of the client to each line, that of a
partition or VP also its id (contextvars: trio gives each task its own copy). Tracebacks omit local variables,
which may hold tokens. Text from outside is escaped: an event stays on one line and cannot control the
terminal. A line that a client caused takes its place in the share of its uid, and has its texts cut; one
beyond the share is counted in `not_logged` of the next (`log_share`).
"""

from __future__ import annotations

import logging
import os
import sys
from functools import cache
from typing import Any

import structlog
from structlog import DropEvent
from structlog.stdlib import ProcessorFormatter
from structlog.tracebacks import ExceptionDictTransformer
from structlog.typing import EventDict, Processor

from interceptd.config.schema import Log
from interceptd.log_share import Severity, current_share
from interceptd.logs.journal import ENTRY, MESSAGE, entry
from interceptd.logs.output import JournalLogger, StderrLogger
from interceptd.logs.text import make_visible, write_traceback
from interceptd.systemd.journald import PRIORITIES, Journal, Priority, is_journal


def configure_logs(log: Log) -> None:
    """Set up structlog for the process and route the standard library's logging through it. May be called
    again: loggers are not cached, so each follows from its next line."""
    level = logging.getLevelNamesMapping()[log.level.upper()]
    output = _journal() if format_of(log) == "journal" else StderrLogger()
    structlog.configure(
        processors=processors(log),
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=lambda *_: output,
        cache_logger_on_first_use=False,
    )
    handler = _LibraryHandler(output)
    rendering = [*MESSAGE] if isinstance(output, JournalLogger) else _rendering(log)
    handler.setFormatter(
        ProcessorFormatter(
            foreign_pre_chain=_CONTEXT, processors=[ProcessorFormatter.remove_processors_meta, *rendering]
        )
    )
    logging.basicConfig(handlers=[handler], level=level, force=True)


@cache
def _journal() -> JournalLogger:
    """The one of this process."""
    return JournalLogger(Journal())


def format_of(log: Log) -> str:
    """`log.format`, with `auto` decided by where standard error goes."""
    if log.format != "auto":
        return log.format
    if is_journal(os.environ, sys.stderr.fileno()):
        return "journal"
    return "console" if sys.stderr.isatty() else "json"


def processors(log: Log) -> list[Processor]:
    """What a line passes through, from its event and fields to its text."""
    return [_take_place, *_CONTEXT, *_rendering(log), _charge]


class _LibraryHandler(logging.Handler):
    """Writes what libraries log."""

    def __init__(self, output: StderrLogger) -> None:
        super().__init__()
        self._output = output

    def emit(self, record: logging.LogRecord) -> None:
        line = self.format(record)
        if isinstance(self._output, JournalLogger):
            priority = PRIORITIES.get(record.levelname.lower(), Priority.INFO)
            self._output.entry(*entry(priority, line))
        else:
            self._output.msg(line)


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


def _charge(_: object, method: str, rendered: object) -> Any:
    """The last processor: charge the line, or the entry, to its task's share."""
    share = current_share()
    if share is not None:
        match rendered:
            case str():
                size = len(rendered.encode(errors="backslashreplace"))
            case (bytes() as entry, str()), dict():
                size = len(entry)
            case _:
                raise AssertionError("it is rendered")
        share.charge(_severity(method), size)
    return rendered


def _severity(method: str) -> Severity:
    match method:
        case "error" | "exception" | "critical":
            return Severity.FAILURE
        case "warning":
            return Severity.WARNING
    return Severity.ORDINARY


def _rendering(log: Log) -> list[Processor]:
    match format_of(log):
        case "journal":
            return [*ENTRY]
        case "console":
            return _console()
        case _:
            return _json()


def _json() -> list[Processor]:
    tracebacks = structlog.processors.ExceptionRenderer(ExceptionDictTransformer(show_locals=False))
    return [tracebacks, make_visible, structlog.processors.JSONRenderer()]


def _console() -> list[Processor]:
    return [
        make_visible,
        structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty(), exception_formatter=write_traceback),
    ]
