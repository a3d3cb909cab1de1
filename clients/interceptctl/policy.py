"""`interceptctl policy`: how a partition maps.

Owns its two commands; must not know how failures are worded.
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
_as_json = click.option("--json", "as_json", is_flag=True, help="For scripts: keys are the wire's names.")


@click.group("policy")
def policy_command() -> None:
    """Look at how a partition maps, and change it."""


@policy_command.command("show")
@_partition_id
@_as_json
@click.pass_obj
def show_policy(path: str, partition_id: int, *, as_json: bool) -> None:
    """Show a partition's policy."""
    with operator_client.operator(path) as operator:
        granularity = operator.inspect_partition(partition_id).mmio_granularity
    _tell(partition_id, granularity, as_json=as_json)


@policy_command.command("set")
@_partition_id
@click.option(
    "--mmio-granularity",
    required=True,
    type=click.Choice([choice.value for choice in MmioGranularity]),
    help="How much of an MMIO region one first touch maps.",
)
@_as_json
@click.pass_obj
def set_policy(path: str, partition_id: int, mmio_granularity: str, *, as_json: bool) -> None:
    """Change how a partition maps from now on; what is mapped stays."""
    granularity = MmioGranularity(mmio_granularity)
    with operator_client.operator(path) as operator:
        operator.set_policy(partition_id, mmio_granularity=granularity)
    _tell(partition_id, granularity, as_json=as_json)


def _tell(partition_id: int, granularity: str, *, as_json: bool) -> None:
    """Print the policy; of a granularity that only a later daemon knows, its word alone."""
    if as_json:
        click.echo(json.dumps({"partition_id": partition_id, "mmio_granularity": granularity}, indent=2))
    else:
        meaning = f": {_MEANINGS[granularity]}" if granularity in _MEANINGS else ""
        click.echo(f"partition {partition_id}: mmio_granularity is {visible(granularity)}{meaning}")
