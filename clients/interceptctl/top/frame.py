"""One frame of `top`: a summary, and one line per partition or VP, in 80 columns.

Owns headings and layout; must not know where the numbers come from, nor when the next frame is due.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from intercept_protocol.messages import DaemonStatistics
from intercept_protocol.outcomes import Outcome
from intercept_protocol.text import visible
from interceptctl import silence, units

from .rates import HISTORY, Rate, Sort, VpRate

AROUND: Final = 7
"""Lines around the table: two of summary, one blank, two of headings, "and N more", and the keys."""
BARS: Final = "▁▂▃▄▅▆▇█"
SPARK: Final = 8
"""Rates in a partition's sparkline. A VP's shows all."""
_UNUSUAL: Final = (Outcome.RETRY, Outcome.FORWARD, Outcome.FAIL)
"""Outcomes that get a column; the remaining intercepts resumed."""
_RATE: Final = "INTERCEPTS\nPER SECOND"
_AT_ONCE, _WAITED = f"AT ONCE\n{units.P50_P99}", f"WAITED\n{units.P50_P99}"


def frame(
    daemon: DaemonStatistics, lines: Sequence[Rate], height: int, sort: Sort | None = None
) -> RenderableType:
    """Partitions in at most `height` lines; those that do not fit are counted. `sort` is shown with the keys,
    which are left out if it is None."""
    shown = lines[: max(1, height - AROUND)]
    table = _partitions(shown) if shown else Text("no partitions")
    intercepts = sum(line.intercepts for line in lines)
    invalidations = sum(line.invalidations for line in lines)
    doing = f"{rate(intercepts)} intercepts, {rate(invalidations)} invalidations"
    if pages := [line.restored_pages for line in lines if line.restored_pages is not None]:
        doing += f", {units.pages(round(sum(pages)))} restored"
    if unwatched := sum(silence.is_unwatched(line.summary) for line in lines):
        doing += f"; {unwatched:,} not watched"
    return _around(daemon, doing, table, len(lines) - len(shown), _keys(sort, "v VPs"))


def vp_frame(
    daemon: DaemonStatistics, lines: Sequence[VpRate], height: int, sort: Sort | None = None
) -> RenderableType:
    """Like `frame`, for VPs."""
    shown = lines[: max(1, height - AROUND)]
    table = _vps(shown) if shown else Text("no VPs")
    doing = f"{rate(sum(line.intercepts for line in lines))} intercepts"
    return _around(daemon, doing, table, len(lines) - len(shown), _keys(sort, "p partitions"))


def away() -> RenderableType:
    """What is shown while there is no daemon."""
    return Group(Text("daemon went away, waiting"), Text(""), Text("q quit", style="dim"))


def sparkline(history: Sequence[float]) -> str:
    """The rates relative to their maximum, the latest on the right."""
    highest = max(history, default=0.0)
    if highest <= 0:
        return BARS[0] * len(history)
    top = len(BARS) - 1
    return "".join(BARS[min(top, round(rate / highest * top))] for rate in history)


def rate(value: float) -> str:
    """A rate in at most six characters: 0, 0.25, 7.5, 1234, 123k."""
    if value == 0:
        return "0"
    return f"{value:.2g}" if value < 9.95 else units.count(round(value))


def _around(
    daemon: DaemonStatistics, doing: str, table: RenderableType, more: int, keys: Text | None
) -> RenderableType:
    summary = Text(
        f"interceptd up {units.duration(daemon.uptime_ms)}: {units.of(daemon.partitions, 'partition')}, "
        f"{units.of(daemon.vps, 'VP')}, {units.of(daemon.connections, 'connection')}\n"
        f"per second: {doing}",
        no_wrap=True,
        overflow="ellipsis",
    )
    parts: list[RenderableType] = [summary, Text(""), table]
    if more:
        parts.append(Text(f"and {more} more", style="dim"))
    if keys is not None:
        parts.append(keys)
    return Group(*parts)


def _keys(sort: Sort | None, other: str) -> Text | None:
    return None if sort is None else Text(f"q quit  {other}  s sort: {sort}", style="dim")


def _partitions(lines: Sequence[Rate]) -> Table:
    table = _table({"ID": 2, "NAME": -8, "VPS": 3, _RATE: 10, "RETRY": 5, "FORWARD": 7, "FAIL": 4,
                    _AT_ONCE: 11, _WAITED: 11, "TREND": -SPARK})  # fmt: skip
    for line in lines:
        _row(
            table,
            str(line.summary.partition_id),
            line.summary.name,
            units.count(line.summary.vps),
            rate(line.intercepts),
            *(rate(line.outcomes[outcome.value]) for outcome in _UNUSUAL),
            units.p50_p99(line.at_once),
            units.p50_p99(line.waited),
            sparkline(line.history[-SPARK:]).rjust(SPARK),
        )
    return table


def _vps(lines: Sequence[VpRate]) -> Table:
    table = _table({"ID": 2, "NAME": -8, "VP": 3, _RATE: 10, "MEAN": 5, _AT_ONCE: 11, _WAITED: 11,
                    "TREND": -HISTORY})  # fmt: skip
    for line in lines:
        _row(
            table,
            str(line.partition_id),
            line.name,
            str(line.vp_index),
            rate(line.intercepts),
            units.latency(line.mean_ns),
            units.p50_p99(line.at_once),
            units.p50_p99(line.waited),
            sparkline(line.history).rjust(HISTORY),
        )
    return table


def _table(columns: dict[str, int]) -> Table:
    """Headings of one or two lines with their widths: positive is a minimum width, right-aligned; negative is
    a fixed width, left-aligned."""
    table = Table(box=None, pad_edge=False, padding=(0, 1), collapse_padding=True)
    for name, width in columns.items():
        heading = name if "\n" in name else f"\n{name}"
        if width > 0:
            table.add_column(heading, justify="right", min_width=width, no_wrap=True)
        else:
            table.add_column(heading, width=-width, no_wrap=True, overflow="ellipsis")
    return table


def _row(table: Table, *cells: str) -> None:
    table.add_row(*(Text(visible(cell)) for cell in cells))
