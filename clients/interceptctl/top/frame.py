"""One frame of `top`: a summary, a line a partition, in 80 columns.

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
from interceptctl import words

from .rates import HISTORY, Rate

AROUND: Final = 5
"""Lines of a frame that are no partition's: two of summary, a blank one, the headings, and how many more."""
BARS: Final = "▁▂▃▄▅▆▇█"
_NUMBERS: Final = {
    "INT/s": 6, "RESUME": 6, "RETRY": 6, "FORWD": 6, "FAIL": 5, "INV/s": 6,
}  # fmt: skip
_OUTCOMES: Final = (Outcome.RESUME, Outcome.RETRY, Outcome.FORWARD, Outcome.FAIL)


def frame(daemon: DaemonStatistics, rates: Sequence[Rate], height: int) -> RenderableType:
    """At most `height` lines; the partitions that do least are left out, and counted."""
    shown = rates[: max(1, height - AROUND)]
    parts: list[RenderableType] = [_summary(daemon, rates), Text("")]
    parts.append(_table(shown) if shown else Text("no partitions"))
    if len(shown) < len(rates):
        parts.append(Text(f"and {len(rates) - len(shown)} more, with less to do", style="dim"))
    return Group(*parts)


def sparkline(history: Sequence[float]) -> str:
    """The rates against the highest of them, the latest to the right."""
    highest = max(history, default=0.0)
    if highest <= 0:
        return BARS[0] * len(history)
    top = len(BARS) - 1
    return "".join(BARS[min(top, round(rate / highest * top))] for rate in history)


def rate(value: float) -> str:
    """Per second, in at most six characters: 0, 0.25, 7.5, 1234, 123k."""
    if value == 0:
        return "0"
    return f"{value:.2g}" if value < 9.95 else words.count(round(value))


def _summary(daemon: DaemonStatistics, rates: Sequence[Rate]) -> Text:
    intercepts = sum(line.intercepts for line in rates)
    invalidations = sum(line.invalidations for line in rates)
    return Text(
        f"interceptd up {words.duration(daemon.uptime_ms)}: {words.count(daemon.partitions)} partitions, "
        f"{words.count(daemon.vps)} VPs, {words.count(daemon.connections)} connections\n"
        f"per second: {rate(intercepts)} intercepts, {rate(invalidations)} invalidations",
        no_wrap=True,
        overflow="ellipsis",
    )


def _table(rates: Sequence[Rate]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 1), collapse_padding=True)
    table.add_column("ID", justify="right", no_wrap=True)
    table.add_column("NAME", width=10, no_wrap=True, overflow="ellipsis")
    table.add_column("VPS", justify="right", no_wrap=True)
    table.add_column("GFNS", justify="right", min_width=5, no_wrap=True)
    for heading, width in _NUMBERS.items():
        table.add_column(heading, justify="right", min_width=width, no_wrap=True)
    table.add_column("INT/s WAS", width=HISTORY, no_wrap=True)
    for line in rates:
        summary = line.summary
        cells = (
            str(summary.partition_id),
            words.visible(summary.name),
            words.count(summary.vps),
            words.count(summary.mapped_gfns),
            rate(line.intercepts),
            *(rate(line.outcomes[outcome.value]) for outcome in _OUTCOMES),
            rate(line.invalidations),
            sparkline(line.history).rjust(HISTORY),
        )
        table.add_row(*map(Text, cells))
    return table
