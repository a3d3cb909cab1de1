"""`interceptctl doctor`.

Owns its options, its table and its exit code; must not know how anything is found out.
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
from .finding import Finding, Setting, State

_COLOURS: Final = {State.OK: "green", State.LIMITED: "yellow", State.MISSING: "bold red"}


@click.command("doctor")
@click.option(
    "--for",
    "setting",
    type=click.Choice([setting.value for setting in Setting]),
    default=Setting.GUESTS.value,
    show_default=True,
    help="What the daemon is for: model needs nothing, live is memory of processes, guests run under KVM.",
)
@click.option(
    "--vmm-socket",
    metavar="PATH",
    type=SOCKET_PATH,
    help="The VMMs' socket  [default: vmm.sock beside the operator's].",
)
@click.option("--json", "as_json", is_flag=True, help="For scripts: name, setting, state, found, mend.")
@click.pass_obj
def doctor_command(path: str, setting: str, vmm_socket: str | None, *, as_json: bool) -> None:
    """Say what this machine lacks, for this user, and how to mend it.

    Exit code 1 if something is missing; what is merely limited does without.
    """
    findings = [
        finding for finding in examine(path, vmm_socket) if finding.setting in Setting(setting).included
    ]
    if as_json:
        click.echo(json.dumps({"findings": msgspec.to_builtins(findings)}, indent=2))
    else:
        render.show(table(findings))
    sys.exit(any(finding.state is State.MISSING for finding in findings))


def examine(path: str, vmm_socket: str | None) -> Sequence[Finding]:
    """Everything that is looked at, for the user who runs this."""
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
    """A row a finding, with its mend below what was found."""
    table = Table(box=None, pad_edge=False, padding=(0, 1), collapse_padding=True)
    for heading in ("CHECK", "FOR", "STATE"):
        table.add_column(heading, no_wrap=True)
    table.add_column("FOUND", overflow="fold")
    for finding in findings:
        found = Text(visible(finding.found))
        if finding.mend:
            found.append(f"\nmend: {finding.mend}", style="bold")
        table.add_row(
            Text(finding.name),
            Text(finding.setting),
            Text(finding.state, style=_COLOURS[finding.state]),
            found,
        )
    return table
