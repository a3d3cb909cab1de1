"""Runs guests with a private daemon or a given one.

Turns every failure into an error message and an exit code. Must not know options.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Final

import click
import trio

from intercept_client import ConnectionLost
from intercept_client.kvm import Coverage, KvmUnavailable, Machine
from intercept_protocol.errors import ProtocolViolation, WireError
from interceptctl import operator_client
from interceptctl.exercise.daemon_process import DaemonFailed, running_daemon

from .outcome import GuestReport
from .playing import play_all
from .scenarios import SCENARIOS, Kill, Scenario

_UNREACHABLE: Final = (ConnectionLost, ProtocolViolation, DaemonFailed, OSError)


class NoKvm(click.ClickException):
    exit_code = 4


def select(names: Sequence[str], *, may_kill: bool) -> Sequence[Scenario]:
    """The scenarios with these names, or all that may be run; raises UsageError for an unknown name."""
    known = {scenario.name: scenario for scenario in SCENARIOS if may_kill or not scenario.kills}
    unknown = [name for name in names if name not in known]
    if unknown:
        raise click.UsageError(f"unknown guest {unknown[0]!r}; the guests are: {', '.join(known)}")
    return [known[name] for name in names or known]


def run(
    path: str | None, coverage: str, scenarios: Sequence[Scenario], tell: Callable[[str], None]
) -> GuestReport:
    """Run the scenarios with the daemon at `path`, or a private one for None.

    Raises `NoKvm`, and `operator_client.Refused` or `Unreachable` if the guests could not run to the end.
    """
    play = partial(play_all, coverage=Coverage[coverage.upper()], scenarios=scenarios, tell=tell)
    try:
        Machine.open().close()
        return play(path, _kill_nobody) if path is not None else trio.run(_with_private_daemon, play)
    except KvmUnavailable as error:
        raise NoKvm(f"cannot run guests: {error}") from error
    except _UNREACHABLE as error:
        raise operator_client.Unreachable(_text(error, path)) from error
    except WireError as error:
        raise operator_client.Refused(f"refused: {_text(error, path)}") from error


async def _with_private_daemon(play: Callable[[str, Kill], GuestReport]) -> GuestReport:
    async with running_daemon() as daemon:
        return await trio.to_thread.run_sync(play, daemon.path, daemon.kill)


def _kill_nobody() -> None:
    raise AssertionError("the daemon is somebody else's")


def _text(error: BaseException, path: str | None) -> str:
    return "\n".join((operator_client.sentence(error, path), *getattr(error, "__notes__", ())))
