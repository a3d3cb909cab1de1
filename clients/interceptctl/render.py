"""Human-readable output: rich tables that fit 80 columns.

Owns headings and layout; must not know sockets or commands. Cells are `Text`, never markup, and control
characters are escaped: a VMM chooses its partition's name, and the daemon may be newer or faulty.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import msgspec
from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from intercept_protocol.addresses import PAGE_SHIFT
from intercept_protocol.messages import (
    DaemonStatistics,
    MappingView,
    PartitionInspection,
    PartitionStatistics,
    PartitionSummary,
    RegionView,
    RestoreStatistics,
    VmaView,
    VpView,
)
from intercept_protocol.outcomes import Access, allows
from intercept_protocol.text import visible

from . import restored, silence, units
from .quantiles import Quantiles, at_once, quantiles

Statistics = PartitionStatistics | DaemonStatistics
Counted = Statistics | PartitionSummary


def show(renderable: RenderableType) -> None:
    """Print to stdout; 80 columns wide when it is not a terminal."""
    console().print(renderable)


def console() -> Console:
    """Stdout, without markup, emoji or highlighting."""
    return Console(highlight=False, emoji=False, markup=False)


def partitions(summaries: Sequence[PartitionSummary]) -> RenderableType:
    if not summaries:
        return Text("no partitions")
    table = headed(
        *("ID>", "NAME", "UID>", "PID>", "VPS>", "MAPPED>", "INTERCEPTS>"),
        *(f"AT ONCE\n{units.P50_P99}>", f"WAITED\n{units.P50_P99}>", "AGE>"),
    )
    for summary in summaries:
        add_row(
            table,
            summary.partition_id,
            name(summary.name),
            summary.uid,
            silence.pid(summary.pid),
            units.count(summary.vps),
            units.pages(summary.mapped_gfns),
            units.count(summary.intercepts),
            units.p50_p99(_at_once(summary)),
            units.p50_p99(_waited(summary)),
            units.duration(summary.age_ms),
        )
    return Group(table, *(Text(f"\n{note}") for note in silence.notes(summaries)))


def inspection(view: PartitionInspection) -> RenderableType:
    """One partition in full."""
    summary = view.summary
    facts: dict[str, object] = {
        "name": summary.name,
        "owner": silence.owner(summary),
        "age": units.duration(summary.age_ms),
        "architecture": view.architecture,
        "address_space": summary.address_space,
        "watch": silence.watch(view),
        "notifiers": view.notifiers,
        "hypervisor": silence.hypervisor(view),
        "mmio_granularity": view.mmio_granularity,
        "mapped": units.pages(summary.mapped_gfns),
    }
    return Group(
        Text(f"partition {summary.partition_id}"),
        Padding(
            _facts({name: fact for name, fact in facts.items() if fact is not None}),
            (0, 0, 0, 2),
            expand=False,
        ),
        *_restore(view.statistics.restore),
        *_section("statistics", statistics_table(view.statistics)),
        *_section(_of("regions", len(view.regions), view.statistics.regions), regions(view.regions)),
        *_section(
            _of("virtual processors", len(view.virtual_processors), summary.vps),
            _vps(view.virtual_processors),
        ),
    )


def _restore(now: RestoreStatistics | None) -> tuple[RenderableType, ...]:
    if now is None:
        return ()
    return _section(f"restore: {restored.state(now)}", Text("\n".join(restored.figures(now))))


def statistics_table(statistics: Statistics) -> RenderableType:
    """Every counter under its name in the protocol, latencies, and intercepts by outcome and reason."""
    counters: dict[str, object] = _counters(statistics)
    for name, took in (
        ("answered at once", _at_once(statistics)),
        ("waited", _waited(statistics)),
    ):
        if took.p50_ns is not None:
            half, most = units.latency(took.p50_ns), units.latency(took.p99_ns)
            counters[name] = f"p50 <= {half}, p99 <= {most}"
    table = headed("OUTCOME", "REASON", "INTERCEPTS>")
    for outcome, reasons in statistics.intercepts.items():
        for reason, number in reasons.items():
            add_row(table, outcome, reason, f"{number:,}")
    parts: list[RenderableType] = [_facts(counters)]
    if table.row_count:
        parts += [Text(""), table]
    if isinstance(statistics, PartitionStatistics) and statistics.restore is not None:
        parts += _section("restore", _facts(_counters(statistics.restore)))
    if isinstance(statistics, PartitionStatistics) and statistics.unresolved:
        parts += [Text(""), _unresolved(statistics.unresolved)]
    return Group(*parts)


def _counters(statistics: Statistics | RestoreStatistics) -> dict[str, object]:
    return {
        name: f"{value:,}"
        for name, value in msgspec.structs.asdict(statistics).items()
        if isinstance(value, int)
    }


def _unresolved(counts: Mapping[str, int]) -> Table:
    """Why looks at the VMM's memory found nothing to map."""
    table = headed("NOT MAPPED", "BECAUSE", "TIMES>")
    for cause, number in sorted(counts.items(), key=lambda item: -item[1]):
        add_row(table, cause, silence.CAUSES.get(cause, ""), f"{number:,}")
    return table


def _at_once(counted: Counted) -> Quantiles:
    return quantiles((), at_once(counted.latency, counted.latency_waited))


def _waited(counted: Counted) -> Quantiles:
    return quantiles((), counted.latency_waited)


def regions(views: Iterable[RegionView]) -> Table:
    """Regions: where the guest sees them and where they start in the VMM."""
    table = headed("GUEST PHYSICAL>", "VMM ADDRESS>", "KIND", "STATE", "RIGHTS", "SIZE>", "MAPPED>")
    for region in views:
        add_row(
            table,
            units.span(region.start_gfn, region.page_count),
            f"{region.start_uaddr:#x}",
            region.kind,
            region.state,
            _rights(readable=True, writable=region.writable, executable=region.executable),
            units.pages(region.page_count),
            units.pages(region.mapped_gfns),
        )
    return table


def vmas(views: Iterable[VmaView]) -> Table:
    """What a VMM declared: addresses, and the host pages behind them."""
    table = headed("VMM ADDRESSES>", "HOST PHYSICAL>", "RIGHTS", "DEVICE", "SIZE>")
    for vma in views:
        add_row(
            table,
            units.span(vma.start_uaddr >> PAGE_SHIFT, vma.page_count),
            units.address(vma.start_pfn),
            _rights(readable=vma.readable, writable=vma.writable, executable=vma.executable),
            "yes" if vma.io else "no",
            units.pages(vma.page_count),
        )
    return table


def mappings(views: Iterable[MappingView]) -> Table:
    """What a guest reaches, and the frame of each first page."""
    table = headed("GUEST PHYSICAL>", "VMM ADDRESS>", "BACKING", "PAGE>", "RIGHTS", "SIZE>")
    for mapping in views:
        backing, page = mapping.frame
        access = Access(mapping.access & 7)
        add_row(
            table,
            units.span(mapping.start_gfn, mapping.page_count),
            f"{mapping.start_uaddr:#x}",
            backing,
            f"{page:#x}",
            _rights(
                readable=allows(access, Access.READ),
                writable=allows(access, Access.WRITE),
                executable=allows(access, Access.EXECUTE),
            ),
            units.pages(mapping.page_count),
        )
    return table


def _rights(*, readable: bool, writable: bool, executable: bool) -> str:
    return ("r" if readable else "-") + ("w" if writable else "-") + ("x" if executable else "-")


def _vps(vps: Iterable[VpView]) -> Table:
    table = headed("VP>", "STATE", "INTERCEPTS>")
    for vp in vps:
        add_row(table, vp.vp_index, vp.state, f"{vp.intercepts:,}")
    return table


def _section(title: str, body: RenderableType) -> tuple[RenderableType, ...]:
    return Text(""), Text(title), Padding(body, (0, 0, 0, 2), expand=False)


def _of(title: str, shown: int, total: int) -> str:
    return f"{title}: {total:,}" if shown == total else f"{title}: {shown:,} of {total:,} shown"


def _facts(facts: Mapping[str, object]) -> Table:
    table = Table.grid(padding=(0, 2))
    for name, value in facts.items():
        add_row(table, name, value)
    return table


def name(text: str) -> Text:
    """A cell that is cut where the table is too wide."""
    return Text(visible(text), no_wrap=True, overflow="ellipsis")


def headed(*headings: str) -> Table:
    """A table without borders. A heading that ends in > makes a right-aligned column of numbers.

    One-line headings are aligned with the last line of two-line headings.
    """
    table = Table(box=None, pad_edge=False, padding=(0, 1), collapse_padding=True)
    lines = 1 + max(heading.count("\n") for heading in headings)
    for heading in ("\n" * (lines - 1 - heading.count("\n")) + heading for heading in headings):
        if heading.endswith(">"):
            table.add_column(heading[:-1], justify="right", overflow="fold")
        else:
            table.add_column(heading, overflow="fold")
    return table


def add_row(table: Table, *cells: object) -> None:
    table.add_row(*(cell if isinstance(cell, Text) else Text(visible(str(cell))) for cell in cells))
