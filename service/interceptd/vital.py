"""Tasks without which the daemon is of no use, where something outlives it.

If one fails, the process ends at once: to unwind would close the connections that the next daemon is to get.
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
"""Exit statuses, sysexits.h: a vital task failed; the daemon rests, and another one is to go on."""


async def vital(keeps: Callable[[], bool], task: Callable[..., Awaitable[object]], *args: object) -> None:
    """Run a task, which raises what it would, unless the daemon `keeps`."""
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
        with suppress(Exception):  # it may be closed, full, or None: nothing may stop us now
            stream.flush()
    os._exit(status)
