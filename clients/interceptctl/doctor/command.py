"""`interceptctl doctor`.

Owns its options, table and exit code; must not know how anything is probed.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import click
import msgspec
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from intercept_protocol.text import visible
from interceptctl import render
from interceptctl.completion import SOCKET_PATH

from . import confinement, kernel, sockets
from .finding import Finding, Mode, State

_COLOURS: Final = {State.OK: "green", State.LIMITED: "yellow", State.MISSING: "bold red"}


@click.command("doctor")
@click.option(
    "--for",
    "mode",
    type=click.Choice([mode.value for mode in Mode]),
    default=Mode.GUESTS.value,
    show_default=True,
    help="The mode to check for: model (needs nothing), live (process memory), guests (under KVM).",
)
@click.option(
    "--vmm-socket",
    metavar="PATH",
    type=SOCKET_PATH,
    envvar="INTERCEPTD_SOCKET",
    show_envvar=True,
    help="The VMM socket  [default: vmm.sock in the directory of the operator socket].",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON: name, mode, state, found, fix.")
@click.pass_obj
def doctor_command(path: str, mode: str, vmm_socket: str | None, *, as_json: bool) -> None:
    """Check what is missing on this machine, for this user, and how to fix it.

    Exit code 1 if anything is missing. What is limited works, with the restriction shown.
    """
    findings = [finding for finding in examine(path, vmm_socket) if finding.mode in Mode(mode).included]
    if as_json:
        click.echo(json.dumps({"findings": msgspec.to_builtins(findings)}, indent=2))
    else:
        render.show(table(findings))
    sys.exit(any(finding.state is State.MISSING for finding in findings))


def examine(path: str, vmm_socket: str | None) -> Sequence[Finding]:
    """All findings, for the current user."""
    return (
        sockets.operator_socket(path),
        sockets.vmm_socket(vmm_socket or str(Path(path).with_name("vmm.sock"))),
        sockets.directory(path),
        kernel.descriptors(sockets.stated_limits(path)),
        confinement.user_namespace(),
        kernel.procmap_query(),
        kernel.userfaultfd(),
        kernel.userfaultfd_device(),
        kernel.userfaultfd_sysctl(),
        kernel.peer_pidfd(),
        confinement.pid_namespace(),
        confinement.ptrace_scope(),
        kernel.kvm(),
    )


def table(findings: Sequence[Finding]) -> RenderableType:
    """One row per finding, with the fix below what was found."""
    table = Table(box=None, pad_edge=False, padding=(0, 1), collapse_padding=True)
    for heading in ("CHECK", "MODE", "STATE"):
        table.add_column(heading, no_wrap=True)
    table.add_column("FOUND", overflow="fold")
    for finding in findings:
        found = Text(visible(finding.found))
        if finding.fix:
            found.append(f"\nfix: {finding.fix}", style="bold")
        table.add_row(
            Text(finding.name),
            Text(finding.mode),
            Text(finding.state, style=_COLOURS[finding.state]),
            found,
        )
    return table
