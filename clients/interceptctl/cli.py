"""The commands and their options.

Owns the command line; must not know how errors are worded (`operator_client`) or how tables look (`render`).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Final, TypeVar

import click
import msgspec
from rich.console import RenderableType

from intercept_protocol import messages
from intercept_protocol.messages import Drain, Restart

from . import operator_client, render, units
from .completion import SOCKET_PATH, partition_ids
from .doctor.command import doctor_command
from .exercise.command import exercise_command
from .finite import Finite
from .guest.command import guest_command
from .policy import policy_command
from .record.command import record_command
from .replay.command import replay_command
from .report.command import report_command
from .restore.command import restore_command
from .top.command import top_command
from .vmms import vmms_command
from .watch.command import watch_command

DEFAULT_SOCKET: Final = "/run/interceptd/operator.sock"
HEALTH_TIMEOUT: Final = 3.0
"""Seconds; shorter than the timeouts of the probes in deploy/."""

CHECK_TIMEOUT: Final = 30.0 + operator_client.ANSWER_TIMEOUT
"""Seconds: the daemon tries for 30 whether a successor could go on."""

_HELP = """Inspect and control a running interceptd.

\b
Exit codes:
  0  done
  1  the daemon refused the request, or the output was lost; doctor,
     exercise, guest: a check failed; replay: an answer differs;
     restore: it ended with an error
  2  invalid command line
  3  cannot reach the daemon: no connection, no answer, or connection lost
  4  guest: KVM is not available, or no C compiler for --vmm c
"""

_ReplyT = TypeVar("_ReplyT")
_FunctionT = TypeVar("_FunctionT", bound=Callable[..., None])


@click.group(help=_HELP)
@click.option(
    "--socket",
    "path",
    metavar="PATH",
    type=SOCKET_PATH,
    envvar="INTERCEPTCTL_SOCKET",
    default=DEFAULT_SOCKET,
    show_default=True,
    show_envvar=True,
    help="The daemon's operator socket.",
)
@click.version_option(package_name="interceptd", prog_name="interceptctl")
@click.pass_context
def main(context: click.Context, path: str) -> None:
    context.obj = path


def _as_json(command: _FunctionT) -> _FunctionT:
    return click.option(
        "--json", "as_json", is_flag=True, help="Print JSON; keys are the field names of the protocol."
    )(command)


_partition_id = click.argument(
    "partition_id", metavar="ID", type=click.IntRange(0, 2**64 - 1), shell_complete=partition_ids
)


@main.command("ls")
@_as_json
@click.pass_obj
def list_partitions(path: str, *, as_json: bool) -> None:
    """List the partitions."""
    with operator_client.operator(path) as operator:
        summaries = operator.list_partitions()
    _print_list("partitions", summaries, render.partitions, as_json=as_json)


@main.command("show")
@_partition_id
@click.option("--regions", "what", flag_value="regions", help="Show all regions instead.")
@click.option("--vmas", "what", flag_value="vmas", help="Show all VMAs that its VMM declared instead.")
@click.option("--mappings", "what", flag_value="mappings", help="Show all that its guest reaches instead.")
@_as_json
@click.pass_obj
def show_partition(path: str, partition_id: int, what: str | None, *, as_json: bool) -> None:
    """Show one partition: its configuration, the first 256 regions, and its virtual processors."""
    with operator_client.operator(path) as operator:
        match what:
            case "regions":
                _print_list(what, operator.list_regions(partition_id), render.regions, as_json=as_json)
            case "vmas":
                _print_list(what, operator.list_vmas(partition_id), render.vmas, as_json=as_json)
            case "mappings":
                _print_list(what, operator.list_mappings(partition_id), render.mappings, as_json=as_json)
            case _:
                _print(operator.inspect_partition(partition_id), render.inspection, as_json=as_json)


@main.command("stats")
@click.argument(
    "partition_id",
    metavar="[ID]",
    required=False,
    type=click.IntRange(0, 2**64 - 1),
    shell_complete=partition_ids,
)
@_as_json
@click.pass_obj
def show_statistics(path: str, partition_id: int | None, *, as_json: bool) -> None:
    """Show the counters of the daemon, or of one partition."""
    with operator_client.operator(path) as operator:
        if partition_id is None:
            _print(operator.statistics(), render.statistics_table, as_json=as_json)
        else:
            inspection = operator.inspect_partition(partition_id)
            _print(inspection.statistics, render.statistics_table, as_json=as_json)


@main.command("health")
@_as_json
@click.pass_obj
def show_health(path: str, *, as_json: bool) -> None:
    """Check that the daemon answers: exit code 0 if it does, 3 if not."""
    with operator_client.operator(path, HEALTH_TIMEOUT) as operator:
        statistics = operator.statistics()
    if as_json:
        _print_json(statistics)
    else:
        click.echo(
            f"serving {units.of(statistics.partitions, 'partition')}, {units.of(statistics.vps, 'VP')}"
        )


@main.command("drain")
@click.option(
    "--timeout",
    metavar="SECONDS",
    required=True,
    type=Finite(0, (2**32 - 1) / 1000),
    help="How long requests in progress may take.",
)
@_as_json
@click.pass_obj
def drain(path: str, timeout: float, *, as_json: bool) -> None:
    """Drain the daemon and wait until it exits.

    It accepts no new work, completes the requests in progress, and ends the rest after SECONDS."""
    request = Drain(timeout_ms=int(timeout * 1000))
    with operator_client.operator(path, timeout + operator_client.ANSWER_TIMEOUT) as operator:
        operator.call(request)
        operator_client.wait_ended(operator)
    _confirm(request, "drained", as_json=as_json)


@main.command("restart")
@_as_json
@click.pass_obj
def restart(path: str, *, as_json: bool) -> None:
    """Restart the daemon, which goes on with all partitions, and wait until it serves.

    It starts the program and reads the configuration that are installed now. If those cannot go on, or if no
    keeper would start the daemon again, nothing happens."""
    request = Restart()
    with operator_client.operator(path, CHECK_TIMEOUT) as operator:
        operator.call(request)
        operator_client.wait_ended(operator)
    operator_client.wait_successor(path)
    _confirm(request, "restarted", as_json=as_json)


def _print(reply: _ReplyT, table: Callable[[_ReplyT], RenderableType], *, as_json: bool) -> None:
    if as_json:
        _print_json(reply)
    else:
        render.show(table(reply))


def _print_list(
    name: str, items: list[_ReplyT], table: Callable[[list[_ReplyT]], RenderableType], *, as_json: bool
) -> None:
    """`name` is that of the list in the protocol."""
    if as_json:
        _print_json({name: items})
    else:
        render.show(table(items))


def _confirm(request: messages.Fields, sentence: str, *, as_json: bool) -> None:
    """For requests with an empty reply: say what was done."""
    if as_json:
        _print_json(request)
    else:
        click.echo(sentence)


def _print_json(value: object) -> None:
    click.echo(json.dumps(msgspec.to_builtins(value), indent=2))


main.add_command(doctor_command)
main.add_command(exercise_command)
main.add_command(guest_command)
main.add_command(policy_command)
main.add_command(record_command)
main.add_command(replay_command)
main.add_command(report_command)
main.add_command(restore_command)
main.add_command(top_command)
main.add_command(vmms_command)
main.add_command(watch_command)
