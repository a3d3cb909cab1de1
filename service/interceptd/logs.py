"""Logging: structlog on standard error, console for people, JSON for machines.

Owns the processors; must not know what is logged. Events are past-tense facts with fields; the partition and
the VP are bound to each line by whoever runs them (contextvars, which trio gives each task its own copy of).
Tracebacks come without local variables: those hold tokens.
"""

from __future__ import annotations

import logging
import os
import sys
from contextlib import suppress

import structlog
from structlog.stdlib import ProcessorFormatter
from structlog.tracebacks import ExceptionDictTransformer
from structlog.typing import Processor

from interceptd.config import Log


class StderrLogger:
    """Writes whole lines; one that cannot be written (disk full, reader gone) is no reason to stop."""

    def msg(self, line: str) -> None:
        with suppress(OSError):
            os.write(sys.stderr.fileno(), f"{line}\n".encode(errors="backslashreplace"))

    debug = info = warning = error = critical = msg


def configure_logs(log: Log) -> None:
    """Set up structlog for the process, and let what libraries log come out the same way. May be repeated:
    loggers are not cached, so that the next line of each is as was said last."""
    as_json = log.format == "json" or (log.format == "auto" and not sys.stderr.isatty())
    level = logging.getLevelNamesMapping()[log.level.upper()]
    context: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
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
