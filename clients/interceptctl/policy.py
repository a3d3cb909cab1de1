"""`interceptctl policy`: how much a partition maps at once.

Owns its two commands; must not know how errors are worded.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Final

import click

from intercept_protocol.messages import MmioGranularity
from intercept_protocol.text import visible
from interceptctl import operator_client
from interceptctl.completion import partition_ids

_MEANINGS: Final[Mapping[str, str]] = {
    MmioGranularity.VMA: "a first touch maps its whole VMA",
    MmioGranularity.PAGE: "a first touch maps one page",
}
_partition_id = click.argument(
    "partition_id", metavar="ID", type=click.IntRange(0, 2**64 - 1), shell_complete=partition_ids
)
_as_json = click.option(
    "--json", "as_json", is_flag=True, help="Print JSON; keys are the field names of the protocol."
)


@click.group("policy")
def policy_command() -> None:
    """Show or change how much a partition maps at once."""


@policy_command.command("show")
@_partition_id
@_as_json
@click.pass_obj
def show_policy(path: str, partition_id: int, *, as_json: bool) -> None:
    """Show a partition's policy."""
    with operator_client.operator(path) as operator:
        granularity = operator.inspect_partition(partition_id).mmio_granularity
    _print(partition_id, granularity, as_json=as_json)


@policy_command.command("set")
@_partition_id
@click.option(
    "--mmio-granularity",
    required=True,
    type=click.Choice([choice.value for choice in MmioGranularity]),
    help="How much of an MMIO region its first touch maps.",
)
@_as_json
@click.pass_obj
def set_policy(path: str, partition_id: int, mmio_granularity: str, *, as_json: bool) -> None:
    """Change a partition's policy. Existing mappings stay."""
    granularity = MmioGranularity(mmio_granularity)
    with operator_client.operator(path) as operator:
        operator.set_policy(partition_id, mmio_granularity=granularity)
    _print(partition_id, granularity, as_json=as_json)


def _print(partition_id: int, granularity: str, *, as_json: bool) -> None:
    """Print the policy; a granularity that only a newer daemon knows is printed without an explanation."""
    if as_json:
        click.echo(json.dumps({"partition_id": partition_id, "mmio_granularity": granularity}, indent=2))
    else:
        meaning = f": {_MEANINGS[granularity]}" if granularity in _MEANINGS else ""
        click.echo(f"partition {partition_id}: mmio_granularity is {visible(granularity)}{meaning}")
