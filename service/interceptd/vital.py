"""Tasks without which the daemon is useless, when its state outlives it.

If one fails, the process ends at once: unwinding would close connections that the next daemon takes over.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import NoReturn

import structlog

log = structlog.get_logger()

EX_SOFTWARE, EX_TEMPFAIL = os.EX_SOFTWARE, os.EX_TEMPFAIL
"""Exit statuses of sysexits.h: a vital task failed; the daemon rests, and its successor goes on."""


async def vital(keeps: Callable[[], bool], task: Callable[..., Awaitable[object]], *args: object) -> None:
    """Run a task. If it fails while the daemon `keeps`, the process ends; otherwise the error is raised."""
    try:
        await task(*args)
    except Exception as error:
        if keeps():
            log.critical("vital_task_failed", exc_info=error)
            leave(EX_SOFTWARE)
        raise


def leave(status: int) -> NoReturn:
    """End the process without unwinding: partitions are not ended, and connections not shut down."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(Exception):  # it may be closed, full or None; nothing may stop the exit
            stream.flush()
    os._exit(status)
