"""`interceptctl top`.

Owns its options, keys, timing and use of the terminal; must not know rates or layout.
"""

from __future__ import annotations

import json
import sys
import time
from contextlib import ExitStack, suppress
from typing import Final, Self

import click
import msgspec
from rich.console import RenderableType
from rich.live import Live

from intercept_client import BlockingOperator
from intercept_protocol.messages import DaemonStatistics
from interceptctl import operator_client, render
from interceptctl.finite import Finite

from .frame import away, frame, vp_frame
from .keys import END, key_within, single_keys
from .rates import Rate, Rates, Sample, Sort, VpRate, in_order
from .sampling import View, sample

QUITS: Final = ("q", END)
_SORTS: Final = list(Sort)


@click.command("top")
@click.option(
    "--interval",
    metavar="SECONDS",
    type=Finite(0.1, 3600),
    default=1.0,
    show_default=True,
    help="Time between frames.",
)
@click.option("--vps", is_flag=True, help="One line per VP instead of one per partition.")
@click.option(
    "--sort",
    type=click.Choice([sort.value for sort in Sort]),
    default=Sort.RATE.value,
    show_default=True,
    help="Order: highest rate, highest P99 of the intercepts answered at once, most retries, or lowest id.",
)
@click.option("--once", is_flag=True, help="Print one frame after one interval and exit.")
@click.option("--json", "as_json", is_flag=True, help="With --once: print the rates as JSON.")
@click.pass_obj
def top_command(path: str, interval: float, *, vps: bool, sort: str, once: bool, as_json: bool) -> None:
    """Show the rates of partitions or VPs, live.

    P50 and P99 are upper bounds on the latency of the last interval's intercepts: of those answered AT ONCE,
    and of those that WAITED for an invalidation or for another VP. RETRY, FORWARD and FAIL are per second;
    all other intercepts resumed.

    When the daemon ends, waits for the next, whose counters begin anew, and goes on.

    \b
    Keys: q or Ctrl-C quits, v shows VPs, p shows partitions, s changes the order
    """
    if as_json and not once:
        raise click.UsageError("--json requires --once")
    if not once and (not sys.stdout.isatty() or render.console().is_dumb_terminal):
        raise click.UsageError("output is not a terminal that can be redrawn; use --once to print one frame")
    shown = _Shown(View.VPS if vps else View.PARTITIONS, Sort(sort))
    if once:
        with operator_client.operator(path) as operator:
            _print_one(operator, interval, shown, as_json=as_json)
    else:
        with _Screen(interval, shown) as screen, suppress(KeyboardInterrupt):
            operator_client.outlast(lambda: operator_client.operator(path), screen.follow, screen.wait)


class _Shown:
    """What the next frame shows. Each view keeps its own samples."""

    def __init__(self, view: View, sort: Sort) -> None:
        self.view = view
        self._sort = sort
        self._rates = {view: Rates() for view in View}
        self._daemon: DaemonStatistics | None = None
        self._partitions: list[Rate] = []
        self._vps: list[VpRate] = []

    def take(self, taken: Sample) -> None:
        self._daemon = taken.daemon
        if self.view is View.VPS:
            self._vps = self._rates[self.view].take_vps(taken)
        else:
            self._partitions = self._rates[self.view].take(taken)

    def forget(self) -> None:
        """The next sample is another daemon's."""
        for rates in self._rates.values():
            rates.forget()

    def lines(self) -> list[Rate] | list[VpRate]:
        if self.view is View.VPS:
            return in_order(self._vps, self._sort)
        return in_order(self._partitions, self._sort)

    def draw(self, height: int, *, keys: bool) -> RenderableType:
        """The frame of the last sample."""
        assert self._daemon is not None, "there is a sample before there is a frame"
        sort = self._sort if keys else None
        if self.view is View.VPS:
            return vp_frame(self._daemon, in_order(self._vps, self._sort), height, sort)
        return frame(self._daemon, in_order(self._partitions, self._sort), height, sort)

    def obey(self, key: str) -> None:
        """Act on a key; ignore all others."""
        match key:
            case "v":
                self.view = View.VPS
            case "p":
                self.view = View.PARTITIONS
            case "s":
                self._sort = _SORTS[(_SORTS.index(self._sort) + 1) % len(_SORTS)]


def _print_one(operator: BlockingOperator, interval: float, shown: _Shown, *, as_json: bool) -> None:
    shown.take(sample(operator, shown.view))
    time.sleep(interval)
    taken = sample(operator, shown.view)
    shown.take(taken)
    if as_json:
        fields = {"daemon": taken.daemon, shown.view.value: shown.lines()}
        click.echo(json.dumps(msgspec.to_builtins(fields), indent=2))
    else:
        render.show(shown.draw(sys.maxsize, keys=False))


class _Screen:
    """The terminal's alternate screen, from the first connection until q or Ctrl-C."""

    def __init__(self, interval: float, shown: _Shown) -> None:
        self._interval = interval
        self._shown = shown
        self._terminal = ExitStack()
        self._live: Live | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._terminal.close()

    def follow(self, operator: BlockingOperator) -> None:
        """Draw frames until q."""
        shown, live = self._shown, self._opened()
        shown.forget()
        due, view = time.monotonic(), shown.view
        while True:
            if time.monotonic() >= due or view is not shown.view:
                shown.take(sample(operator, shown.view))
                due, view = time.monotonic() + self._interval, shown.view
            live.update(shown.draw(live.console.height, keys=True), refresh=True)
            key = key_within(max(0.0, due - time.monotonic()))
            if key in QUITS:
                return
            shown.obey(key or "")

    def wait(self, seconds: float) -> bool:
        """Say that the daemon went away, and let the time pass, or less; False at q."""
        self._opened().update(away(), refresh=True)
        return key_within(seconds) not in QUITS

    def _opened(self) -> Live:
        if self._live is None:
            self._terminal.enter_context(single_keys())
            live = Live(console=render.console(), screen=True, auto_refresh=False)
            self._live = self._terminal.enter_context(live)
        return self._live
