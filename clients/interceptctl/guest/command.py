"""`interceptctl guest`: its options and exit status.

Owns the command line; must not know KVM or what is shown.
"""

from __future__ import annotations

import json
from collections.abc import Callable

import click
import msgspec
from rich.console import Console

from interceptctl.completion import SOCKET_PATH


@click.command("guest")
@click.argument("names", metavar="[NAME]...", nargs=-1)
@click.option(
    "--vmm-socket",
    metavar="PATH",
    type=SOCKET_PATH,
    help="Use the daemon that listens there, not one of our own.",
)
@click.option(
    "--coverage",
    type=click.Choice(["announced", "watched"]),
    default="announced",
    show_default=True,
    help="How unmaps reach the daemon: begin and end around them, or a userfaultfd alone.",
)
@click.option("--list", "only_list", is_flag=True, help="Say which guests there are, and what they show.")
@click.option("--quiet", is_flag=True, help="Print the verdict alone.")
@click.option("--json", "as_json", is_flag=True, help="For scripts: print the report alone, as JSON.")
def guest_command(
    names: tuple[str, ...],
    vmm_socket: str | None,
    coverage: str,
    *,
    only_list: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    """Run real guests under KVM, whose memory the daemon decides; all, or those named.

    A small VMM maps BARs from memfds, runs flat guest programs on up to two vCPUs, serves the daemon's map
    requests with memslots, and checks what the guests saw and wrote. Exit status 1 if something is not as it
    must be, 4 if there is no KVM here.
    """
    from . import program, summary  # noqa: PLC0415 - they import trio, which no other command waits for

    scenarios = program.select(names)
    console = Console(highlight=False, emoji=False, markup=False)
    if only_list:
        for scenario in scenarios:
            console.print(f"{scenario.name}: {scenario.expects}")
        return
    tell: Callable[[str], None] = (lambda _: None) if quiet or as_json else console.print
    report = program.run(vmm_socket, coverage, scenarios, tell)
    if as_json:
        click.echo(json.dumps(msgspec.to_builtins(report), indent=2))
    else:
        console.print(summary.verdict(report) if quiet else summary.summary(report))
    raise SystemExit(0 if report.passed else 1)
