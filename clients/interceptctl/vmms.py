"""`interceptctl vmms`: what each VMM's process holds of the daemon, and what it holds up.

Owns the sums over a process's partitions, their order, and their table. Must not know sockets: see
`operator_client`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from enum import StrEnum
from itertools import groupby
from typing import Final

import click
import msgspec
from rich.console import Group, RenderableType
from rich.text import Text

from intercept_protocol.messages import PartitionSummary

from . import operator_client, render, silence, units


class Vmm(msgspec.Struct, frozen=True, kw_only=True):
    """One process: its partitions' figures, added up."""

    uid: int
    pid: int
    """0 if the process is in another pid namespace; each of its partitions is then on a line of its own."""
    name: str
    """Of its first partition."""
    partition_ids: list[int]
    partitions: int
    vps: int
    waiting_vps: int
    regions: int
    memory_bytes: int
    open_invalidations: int
    oldest_invalidation_ms: int


class Order(StrEnum):
    """What the first line has most of. Ties are in the order of `OPEN`, then of `WAIT`, then by id."""

    OPEN = "open"
    """Time that the oldest open invalidation has been open."""
    WAIT = "wait"
    """VPs that wait."""
    MEMORY = "memory"
    REGIONS = "regions"
    VPS = "vps"
    PARTITIONS = "partitions"


_FIELDS: Final = {
    Order.OPEN: "oldest_invalidation_ms",
    Order.WAIT: "waiting_vps",
    Order.MEMORY: "memory_bytes",
    Order.REGIONS: "regions",
    Order.VPS: "vps",
    Order.PARTITIONS: "partitions",
}


@click.command("vmms")
@click.option(
    "--sort",
    type=click.Choice([order.value for order in Order]),
    default=Order.OPEN.value,
    show_default=True,
    help="Order: the most of it first; open: by how long.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_obj
def vmms_command(path: str, sort: str, *, as_json: bool) -> None:
    """List the VMMs' processes: what each holds, and what it holds up.

    WAIT counts VPs whose intercept waits now, OPEN the invalidations that were begun and not ended, and SINCE
    is how long the oldest of them has been open. MEMORY is what the daemon holds for the process, by its own
    estimate. ID and NAME are those of the process's first partition.
    """
    with operator_client.operator(path) as operator:
        summaries = operator.list_partitions()
    vmms = in_order(by_process(each for each in summaries if not silence.waits_for_vmm(each)), Order(sort))
    if as_json:
        click.echo(json.dumps({"vmms": msgspec.to_builtins(vmms)}, indent=2))
    else:
        render.show(_table(vmms))


def by_process(summaries: Iterable[PartitionSummary]) -> list[Vmm]:
    """By the id of each one's first partition."""
    ordered = sorted(summaries, key=lambda summary: (_process(summary), summary.partition_id))
    vmms = [_vmm(list(own)) for _, own in groupby(ordered, key=_process)]
    return sorted(vmms, key=lambda vmm: vmm.partition_ids)


def in_order(vmms: Iterable[Vmm], order: Order) -> list[Vmm]:
    def key(vmm: Vmm) -> tuple[int, int, int, list[int]]:
        most = getattr(vmm, _FIELDS[order])
        return -most, -vmm.oldest_invalidation_ms, -vmm.waiting_vps, vmm.partition_ids

    return sorted(vmms, key=key)


def _process(summary: PartitionSummary) -> tuple[int, int, int]:
    return summary.uid, summary.pid, 0 if summary.pid else summary.partition_id


def _vmm(own: Sequence[PartitionSummary]) -> Vmm:
    first = own[0]
    return Vmm(
        uid=first.uid,
        pid=first.pid,
        name=first.name,
        partition_ids=[summary.partition_id for summary in own],
        partitions=len(own),
        vps=sum(summary.vps for summary in own),
        waiting_vps=sum(summary.waiting_vps for summary in own),
        regions=sum(summary.regions for summary in own),
        memory_bytes=sum(summary.memory_bytes for summary in own),
        open_invalidations=sum(summary.open_invalidations for summary in own),
        oldest_invalidation_ms=max(summary.oldest_invalidation_ms for summary in own),
    )


def _table(vmms: Sequence[Vmm]) -> RenderableType:
    if not vmms:
        return Text("no partitions")
    table = render.headed(
        *("UID>", "PID>", "ID>", "NAME", "PARTITIONS>", "VPS>"),
        *("WAIT>", "REGIONS>", "MEMORY>", "OPEN>", "SINCE>"),
    )
    for vmm in vmms:
        render.add_row(
            table,
            vmm.uid,
            silence.pid(vmm.pid),
            vmm.partition_ids[0],
            render.name(vmm.name),
            units.count(vmm.partitions),
            units.count(vmm.vps),
            units.count(vmm.waiting_vps),
            units.count(vmm.regions),
            units.size(vmm.memory_bytes),
            units.count(vmm.open_invalidations),
            units.duration(vmm.oldest_invalidation_ms) if vmm.open_invalidations else "",
        )
    note = (Text(f"\n{silence.NO_PID_NOTE}"),) if any(not vmm.pid for vmm in vmms) else ()
    return Group(table, *note)
