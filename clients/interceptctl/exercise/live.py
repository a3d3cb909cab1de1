"""Watching an exercise: a live view on a terminal, elsewhere one line per second.

Owns its layout; must not know what is right, nor change anything.
"""

from __future__ import annotations

import time
from typing import Final

import trio
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from intercept_protocol.messages import PartitionStatistics
from interceptctl import units

from .exercise import Progress
from .lives import added
from .summary import waited_text
from .tally import EVENTS_KEPT

REFRESH: Final = 0.25
LINE_EVERY: Final = 1.0
VPS_SHOWN: Final = 12


async def watch_in_terminal(console: Console, progress: Progress) -> None:
    """Redraw the view until cancelled."""
    view = _View(progress)
    with Live(console=console, auto_refresh=False, transient=True) as live:
        while True:
            live.update(view.render(await progress.vmm.statistics()), refresh=True)
            await trio.sleep(REFRESH)


async def watch_by_lines(console: Console, progress: Progress) -> None:
    """Print one line per second until cancelled."""
    started = time.perf_counter()
    kills = 0

    def tell(what: str) -> None:
        console.print(f"{time.perf_counter() - started:4.0f} s  {what}")

    while True:
        await trio.sleep(LINE_EVERY)
        statistics = await progress.vmm.statistics()
        if progress.kills.count > kills:
            kills = progress.kills.count
            noticed = waited_text(progress.kills.waited, progress.kills.longest_wait)
            tell(f"{units.of(kills, 'kill')} of the daemon: {noticed}")
        tell(_counters(progress, statistics))


async def watch_nothing(progress: Progress) -> None:  # noqa: ARG001 - the signature of all watchers
    """Show nothing until the end."""
    await trio.sleep_forever()


class _View:
    """Keeps the last counts, to compute rates."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._seen = [0] * len(progress.tally.vps)
        self._seen_at = time.perf_counter()

    def render(self, statistics: PartitionStatistics) -> RenderableType:
        events = "\n".join(self._progress.tally.events).ljust(1)
        return Group(
            Panel(self._vps(), title="virtual processors", title_align="left"),
            Panel(Text(events, no_wrap=True), title="the VMM", title_align="left", height=EVENTS_KEPT + 2),
            Text(_counters(self._progress, statistics)),
        )

    def _vps(self) -> Table:
        now = time.perf_counter()
        elapsed = max(now - self._seen_at, 1e-3)
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
        for heading in ("VP", "INTERCEPTS", "PER SECOND"):
            table.add_column(heading, justify="right")
        table.add_column("LAST OUTCOME")
        tallies = self._progress.tally.vps
        for index, (vp, seen) in enumerate(zip(tallies, self._seen, strict=True)):
            if index < VPS_SHOWN:
                rate = (vp.intercepts - seen) / elapsed
                table.add_row(str(index), f"{vp.intercepts:,}", f"{rate:,.0f}", str(vp.last or ""))
        if len(tallies) > VPS_SHOWN:
            rest = sum(vp.intercepts for vp in tallies[VPS_SHOWN:])
            table.add_row("...", f"{rest:,}", "", f"{len(tallies) - VPS_SHOWN} more")
        self._seen, self._seen_at = [vp.intercepts for vp in tallies], now
        return table


def _counters(progress: Progress, statistics: PartitionStatistics) -> str:
    tally, counted = progress.tally, added([*progress.kills.lives, statistics])
    return (
        f"steps {tally.steps:,}  intercepts {tally.answers.total():,}  maps {counted.map_calls:,}  "
        f"invalidations {counted.invalidations:,}  stale {tally.stale_reads}"
    )
