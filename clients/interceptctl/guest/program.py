"""Runs guests with a private daemon or a given one.

Turns every failure into an error message and an exit code. Must not know options.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Final

import click
import trio

from intercept_client import ConnectionLost
from intercept_client.kvm import Coverage, KvmUnavailable, Machine
from intercept_protocol.errors import ProtocolViolation, WireError
from interceptctl import operator_client
from interceptctl.exercise.daemon_process import DaemonFailed, running_daemon

from .c_build import CannotBuild, built_vmm
from .c_vmm import CVmm
from .outcome import GuestReport
from .playing import OpenVmm, play_all
from .scenarios import SCENARIOS, Kill, Scenario
from .small_vmm import SmallVmm

_UNREACHABLE: Final = (ConnectionLost, ProtocolViolation, DaemonFailed, OSError)


class CannotRun(click.ClickException):
    """No KVM, or no compiler."""

    exit_code = 4


def select(names: Sequence[str], *, may_kill: bool) -> Sequence[Scenario]:
    """The scenarios with these names, or all that may be run; raises UsageError for an unknown name."""
    known = {scenario.name: scenario for scenario in SCENARIOS if may_kill or not scenario.kills}
    unknown = [name for name in names if name not in known]
    if unknown:
        raise click.UsageError(f"unknown guest {unknown[0]!r}; the guests are: {', '.join(known)}")
    return [known[name] for name in names or known]


def run(
    path: str | None,
    vmm: str,
    coverage: str,
    scenarios: Sequence[Scenario],
    tell: Callable[[str], None],
) -> GuestReport:
    """Run the scenarios with the VMM in `vmm`, and the daemon at `path`, or a private one for None.

    Raises `CannotRun`, and `operator_client.Refused` or `Unreachable` if the guests could not run to the end.
    """
    try:
        Machine.open().close()
        with _opener(vmm) as open_vmm:
            play = partial(
                play_all,
                open_vmm=open_vmm,
                vmm=vmm,
                coverage=Coverage[coverage.upper()],
                scenarios=scenarios,
                tell=tell,
            )
            if path is None:
                return trio.run(_with_private_daemon, play)
            return play(path, _kill_nobody)
    except (KvmUnavailable, CannotBuild) as error:
        raise CannotRun(f"cannot run guests: {error}") from error
    except _UNREACHABLE as error:
        raise operator_client.Unreachable(_text(error, path)) from error
    except WireError as error:
        raise operator_client.Refused(f"refused: {_text(error, path)}") from error


@contextmanager
def _opener(vmm: str) -> Iterator[OpenVmm]:
    if vmm == "python":
        yield SmallVmm
        return
    with built_vmm() as binary:
        yield partial(CVmm, binary)


async def _with_private_daemon(play: Callable[[str, Kill], GuestReport]) -> GuestReport:
    async with running_daemon() as daemon:
        return await trio.to_thread.run_sync(play, daemon.path, daemon.kill)


def _kill_nobody() -> None:
    raise AssertionError("the daemon is somebody else's")


def _text(error: BaseException, path: str | None) -> str:
    return "\n".join((operator_client.sentence(error, path), *getattr(error, "__notes__", ())))
