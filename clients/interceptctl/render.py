"""What the commands print for people: rich tables that fit 80 columns.

Owns headings and layout; must not know sockets or commands. Cells are `Text`, never markup, and made visible:
a partition's name is its VMM's to choose, and a daemon's words are its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import msgspec
from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from intercept_protocol.messages import (
    DaemonStatistics,
    PartitionInspection,
    PartitionStatistics,
    PartitionSummary,
    RegionView,
    VpView,
)
from intercept_protocol.text import visible

from . import words
from .quantiles import quantile_ns


def show(renderable: RenderableType) -> None:
    """Print to stdout; 80 columns wide when it is not a terminal."""
    console().print(renderable)


def console() -> Console:
    """Stdout, which text is written to as it is."""
    return Console(highlight=False, emoji=False, markup=False)


def partitions(summaries: Sequence[PartitionSummary]) -> RenderableType:
    if not summaries:
        return Text("no partitions")
    table = _table("ID>", "NAME", "UID>", "PID>", "VPS>", "REGIONS>", "MAPPED>", "INTERCEPTS>", "AGE>")
    for summary in summaries:
        _row(
            table,
            summary.partition_id,
            summary.name,
            summary.uid,
            summary.pid,
            words.count(summary.vps),
            words.count(summary.regions),
            words.pages(summary.mapped_gfns),
            words.count(summary.intercepts),
            words.duration(summary.age_ms),
        )
    return table


def inspection(view: PartitionInspection) -> RenderableType:
    """One partition in full."""
    summary = view.summary
    facts: dict[str, object] = {
        "name": summary.name,
        "owner": f"uid {summary.uid}, pid {summary.pid}",
        "age": words.duration(summary.age_ms),
        "architecture": view.architecture,
        "address_space": summary.address_space,
        "hypervisor": summary.hypervisor,
        "mmio_granularity": view.mmio_granularity,
        "mapped": words.pages(summary.mapped_gfns),
    }
    return Group(
        Text(f"partition {summary.partition_id}"),
        Padding(_facts(facts), (0, 0, 0, 2), expand=False),
        *_section("statistics", _statistics(view.statistics, view.statistics.intercepts, summary.latency)),
        *_section(_of("regions", len(view.regions), view.statistics.regions), _regions(view.regions)),
        *_section(
            _of("virtual processors", len(view.virtual_processors), summary.vps),
            _vps(view.virtual_processors),
        ),
    )


def partition_statistics(statistics: PartitionStatistics) -> RenderableType:
    return _statistics(statistics, statistics.intercepts)


def daemon_statistics(statistics: DaemonStatistics) -> RenderableType:
    return _statistics(statistics, statistics.intercepts, statistics.latency)


def _statistics(
    statistics: msgspec.Struct, intercepts: Mapping[str, Mapping[str, int]], latency: Sequence[int] = ()
) -> RenderableType:
    """Every counter under its wire name, then the intercepts by outcome and reason."""
    counters = {
        name: value
        for name, value in msgspec.structs.asdict(statistics).items()
        if name not in ("intercepts", "latency")
    }
    if (median := quantile_ns((), latency, 0.5)) is not None:
        most = quantile_ns((), latency, 0.99)
        counters["latency"] = f"p50 {words.latency(median)}, p99 {words.latency(most)} at most"
    table = _table("OUTCOME", "REASON", "INTERCEPTS>")
    for outcome, reasons in intercepts.items():
        for reason, number in reasons.items():
            _row(table, outcome, reason, number)
    return Group(_facts(counters), Text(""), table) if table.row_count else _facts(counters)


def _regions(regions: Iterable[RegionView]) -> Table:
    table = _table("START_GFN>", "PAGES>", "START_UADDR>", "KIND", "STATE", "RIGHTS", "MAPPED>")
    for region in regions:
        rights = "r" + ("w" if region.writable else "-") + ("x" if region.executable else "-")
        _row(
            table,
            f"{region.start_gfn:#x}",
            f"{region.page_count:#x}",
            f"{region.start_uaddr:#x}",
            region.kind,
            region.state,
            rights,
            words.pages(region.mapped_gfns),
        )
    return table


def _vps(vps: Iterable[VpView]) -> Table:
    table = _table("VP>", "STATE", "INTERCEPTS>")
    for vp in vps:
        _row(table, vp.vp_index, vp.state, vp.intercepts)
    return table


def _section(title: str, body: RenderableType) -> tuple[RenderableType, ...]:
    return Text(""), Text(title), Padding(body, (0, 0, 0, 2), expand=False)


def _of(title: str, shown: int, total: int) -> str:
    return f"{title}: {total}" if shown == total else f"{title}: {shown} of {total} shown"


def _facts(facts: Mapping[str, object]) -> Table:
    table = Table.grid(padding=(0, 2))
    for name, value in facts.items():
        _row(table, name, value)
    return table


def _table(*headings: str) -> Table:
    """A table without rules; a heading that ends in > is a column of numbers, kept whole and to the right."""
    table = Table(box=None, pad_edge=False, padding=(0, 1), collapse_padding=True)
    for heading in headings:
        if heading.endswith(">"):
            table.add_column(heading[:-1], justify="right", overflow="fold")
        else:
            table.add_column(heading, overflow="fold")
    return table


def _row(table: Table, *cells: object) -> None:
    table.add_row(*(Text(visible(str(cell))) for cell in cells))
