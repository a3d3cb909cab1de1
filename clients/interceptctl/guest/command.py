"""`interceptctl guest`: its options and exit code.

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
    help="Use the daemon on this socket instead of starting a private one.",
)
@click.option(
    "--coverage",
    type=click.Choice(["announced", "watched"]),
    default="announced",
    show_default=True,
    help="How the daemon learns of unmaps: announced by begin and end, or watched by userfaultfd only.",
)
@click.option(
    "--vmm",
    type=click.Choice(["python", "c"]),
    default="python",
    show_default=True,
    help="Which VMM runs them; the one in C is built first, by cc.",
)
@click.option("--list", "only_list", is_flag=True, help="List the guests and what each checks.")
@click.option("--quiet", is_flag=True, help="Print only the verdict.")
@click.option("--json", "as_json", is_flag=True, help="Print only the report, as JSON.")
def guest_command(
    names: tuple[str, ...],
    vmm_socket: str | None,
    coverage: str,
    vmm: str,
    *,
    only_list: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    """Run real guests under KVM whose memory is mapped by the daemon: all, or those named.

    A small VMM maps BARs from memfds, runs small guest programs on up to two vCPUs, carries out the daemon's
    map requests with memslots, and checks what the guests saw and wrote. Exit code 1 if a check fails, 4 if
    KVM is not available, or there is no compiler for the VMM in C.
    """
    from . import program, summary  # noqa: PLC0415 - they import trio, which slows the start

    scenarios = program.select(names, may_kill=vmm_socket is None)
    console = Console(highlight=False, emoji=False, markup=False)
    if only_list:
        for scenario in scenarios:
            console.print(f"{scenario.name}: {scenario.expects}")
        return
    tell: Callable[[str], None] = (lambda _: None) if quiet or as_json else console.print
    report = program.run(vmm_socket, vmm, coverage, scenarios, tell)
    if as_json:
        click.echo(json.dumps(msgspec.to_builtins(report), indent=2))
    else:
        console.print(summary.verdict(report) if quiet else summary.summary(report))
    raise SystemExit(0 if report.passed else 1)
