"""`interceptctl exercise`: its options and exit code.

Owns the command line of the exercise; must not know what it does.
"""

from __future__ import annotations

import json

import click
import msgspec
from rich.console import Console

from intercept_protocol.text import visible
from interceptctl import units
from interceptctl.completion import SOCKET_PATH
from interceptctl.finite import Finite

from .memory import Mode
from .scenario import DEFAULT_KILLS, DEFAULT_SECONDS, DEFAULT_SEED, DEFAULT_VPS, MOST_VPS, Scenario


@click.command("exercise")
@click.option(
    "--vmm-socket",
    metavar="PATH",
    type=SOCKET_PATH,
    help="Exercise the daemon on this socket instead of starting a private one.",
)
@click.option("--vps", type=click.IntRange(1, MOST_VPS), default=DEFAULT_VPS, show_default=True)
@click.option(
    "--memory",
    type=click.Choice(["live", "declared"]),
    default="live",
    show_default=True,
    help="live: the VMM maps real memory of this process. declared: it only declares VMAs.",
)
@click.option("--seed", type=int, default=DEFAULT_SEED, show_default=True, help="Seed of all random choices.")
@click.option("--steps", type=click.IntRange(1), help="Stop after this many changes by the VMM.")
@click.option(
    "--seconds",
    type=Finite(0, min_open=True),
    help=f"Stop after this time.  [default: {DEFAULT_SECONDS:g}, or no limit with --steps]",
)
@click.option(
    "--kills",
    type=click.IntRange(0),
    help=f"Kill the private daemon so often, at drawn instants.  [default: {DEFAULT_KILLS}]",
)
@click.option("--quiet", is_flag=True, help="Print only the verdict.")
@click.option("--json", "as_json", is_flag=True, help="Print only the report, as JSON.")
def exercise_command(
    *,
    vmm_socket: str | None,
    vps: int,
    memory: str,
    seed: int,
    steps: int | None,
    seconds: float | None,
    kills: int | None,
    quiet: bool,
    as_json: bool,
) -> None:
    """Drive a daemon with a fake VMM and fake guests, and check every answer.

    The VMM maps, unmaps, protects and remaps parts of several BARs and of RAM while its VPs run. Every answer
    must have been true at some instant between request and reply, and after an acknowledged invalidation no
    guest may reach the old frames. A private daemon is killed meanwhile, and started again by its keeper:
    guests may wait for it, no more. Exit code 1 if any check fails.
    """
    from . import program, summary  # noqa: PLC0415 - they import trio, which slows the start

    if steps is None and seconds is None:
        seconds = DEFAULT_SECONDS
    if kills is None:
        kills = DEFAULT_KILLS if vmm_socket is None else 0
    elif kills and vmm_socket is not None:
        raise click.UsageError("--kills is for a private daemon, and --vmm-socket names another")
    mode = Mode.LIVE if memory == "live" else Mode.DECLARED
    scenario = Scenario(seed=seed, vps=vps, steps=steps, seconds=seconds, mode=mode, kills=kills)
    console = Console(highlight=False, emoji=False, markup=False)
    if not (quiet or as_json):
        console.print(f"{_daemon(vmm_socket)}: {units.of(vps, 'VP')}, seed {seed}")
        console.print(f"mode: {mode.title}")
    report = program.run(vmm_socket, scenario, None if quiet or as_json else console)
    if as_json:
        click.echo(json.dumps(msgspec.to_builtins(report), indent=2))
    else:
        console.print(summary.verdict(report) if quiet else summary.summary(report))
    raise SystemExit(0 if report.passed else 1)


def _daemon(vmm_socket: str | None) -> str:
    return "starting a private daemon" if vmm_socket is None else f"exercising {visible(vmm_socket)}"
