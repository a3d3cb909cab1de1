"""Runs one exercise: with a private daemon or a given one, with a live view or without.

Owns the choice of view, and turns every failure into an error message and an exit code. Must not know
options.
"""

from __future__ import annotations

from functools import partial
from typing import Final

import trio
from rich.console import Console

from intercept_client import ConnectionLost
from intercept_protocol.errors import ProtocolViolation, WireError
from interceptctl import operator_client

from .daemon_process import DaemonFailed, running_daemon
from .exercise import Watch, exercise
from .live import watch_by_lines, watch_in_terminal, watch_nothing
from .patience import Unanswered
from .report import Report
from .scenario import Scenario

_UNREACHABLE: Final = (ConnectionLost, ProtocolViolation, DaemonFailed, Unanswered, OSError)


def run(path: str | None, scenario: Scenario, watching: Console | None) -> Report:
    """Exercise the daemon at `path`, or a private one for None; `watching` shows the progress.

    Raises `operator_client.Refused` or `Unreachable` if the exercise could not be completed.
    """
    try:
        return trio.run(_exercise, path, scenario, _watch(watching))
    except ExceptionGroup as group:
        expected, others = group.split((WireError, *_UNREACHABLE))
        if others is not None or expected is None:
            raise
        raise _failure(_first(expected), expected, path) from group
    except (WireError, *_UNREACHABLE) as error:
        raise _failure(error, error, path) from error


async def _exercise(path: str | None, scenario: Scenario, watch: Watch) -> Report:
    if path is not None:
        return await exercise(path, scenario, watch)
    async with running_daemon() as own:
        return await exercise(own.path, scenario, watch, own.kill)


def _watch(console: Console | None) -> Watch:
    if console is None:
        return watch_nothing
    return partial(watch_in_terminal if console.is_terminal else watch_by_lines, console)


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The first error: the others follow from it."""
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def _failure(
    error: BaseException, annotated: BaseException, path: str | None
) -> operator_client.Refused | operator_client.Unreachable:
    text = "\n".join((operator_client.sentence(error, path), *getattr(annotated, "__notes__", ())))
    if isinstance(error, _UNREACHABLE):
        return operator_client.Unreachable(text)
    return operator_client.Refused(f"refused: {text}")
