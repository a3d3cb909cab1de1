"""`interceptctl replay`: its options and exit code.

Owns the command line and the line of progress. Must not know how a recording is repeated.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

import click
import msgspec

from interceptctl import recordings, units
from interceptctl.completion import SOCKET_PATH
from interceptctl.finite import Finite

if TYPE_CHECKING:
    from .verdict import Verdict

SHOWN_SECONDS: Final = 0.25
"""Between two lines of progress."""


@click.command("replay")
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path))
@click.option(
    "--vmm-socket",
    metavar="PATH",
    type=SOCKET_PATH,
    help="Replay against the daemon on this socket instead of starting a private one.",
)
@click.option(
    "--speed",
    metavar="N",
    type=Finite(0, min_open=True),
    help="N times as fast as recorded  [default: as fast as it goes].",
)
@click.option("--quiet", is_flag=True, help="Print only the verdict.")
@click.option("--json", "as_json", is_flag=True, help="Print only the report, as JSON.")
def replay_command(
    *, file: Path, vmm_socket: str | None, speed: float | None, quiet: bool, as_json: bool
) -> None:
    """Repeat a recording against a daemon, and compare each answer with the recorded one.

    FILE is what `interceptctl record` wrote. Regions, VMAs and invalidations become requests again, in
    recorded order, and each intercept is sent again. Live memory is repeated as declared memory. Answers that
    depend on time, such as a kick's, are counted and not compared.

    The first difference is shown with what FILE says of its page. Exit code 1 if there is one, or if FILE is
    damaged.
    """
    from . import program, summary  # noqa: PLC0415 - they import trio, which slows the start

    shown = _Shown(quiet=quiet or as_json)
    with recordings.opened(file) as recording:
        try:
            report = program.run(vmm_socket, recording, speed, shown.show)
        finally:
            shown.clear()
        if as_json:
            click.echo(json.dumps(msgspec.to_builtins(report), indent=2))
        elif quiet:
            click.echo(summary.judgement(report))
        else:
            for line in summary.lines(report, recording.header):
                click.echo(line)
    raise SystemExit(0 if report.passed else 1)


class _Shown:
    """A line on the terminal that says how far the replay is."""

    def __init__(self, *, quiet: bool) -> None:
        self._wanted = not quiet and sys.stderr.isatty()
        self._shown = time.monotonic()

    def show(self, verdict: Verdict) -> None:
        now = time.monotonic()
        if self._wanted and now - self._shown >= SHOWN_SECONDS:
            self._shown = now
            line = (
                f"{units.of(verdict.compared, 'answer')}, {units.of(verdict.difference_count, 'difference')}"
            )
            click.echo(f"\r\x1b[K{line}", err=True, nl=False)

    def clear(self) -> None:
        if self._wanted:
            click.echo("\r\x1b[K", err=True, nl=False)
