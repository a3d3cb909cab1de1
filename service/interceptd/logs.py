"""Logging: structlog on standard error, console for people, JSON for machines.

Owns the processors; must not know what is logged. Events are past-tense facts with fields; the partition and
the VP are bound to each line by whoever runs them (contextvars, which trio gives each task its own copy of).
"""

from __future__ import annotations

import logging
import sys

import structlog

from interceptd.config import Log


def configure_logs(log: Log) -> None:
    """Set up structlog for the process."""
    as_json = log.format == "json" or (log.format == "auto" and not sys.stderr.isatty())
    renderer: structlog.typing.Processor = (
        structlog.processors.JSONRenderer() if as_json else structlog.dev.ConsoleRenderer()
    )
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            *([structlog.processors.dict_tracebacks] if as_json else []),
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(
            logging.getLevelNamesMapping()[log.level.upper()]
        ),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )
