"""`interceptctl top`.

Owns its options, when it asks, and the terminal meanwhile; must not know rates or layout.
"""

from __future__ import annotations

import errno
import json
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import Final

import click
import msgspec
from rich.live import Live

from intercept_client import BlockingOperator
from intercept_protocol.errors import WireError
from intercept_protocol.messages import InspectPartition, OperatorStatistics
from interceptctl import asking, render

from .frame import frame
from .rates import Counted, Rates, Sample

ASKED_ABOUT: Final = 256
"""Partitions that are asked about one by one; of so many, the first ones by their number."""


@click.command("top")
@click.option(
    "--interval",
    metavar="SECONDS",
    type=click.FloatRange(0.1, 3600),
    default=1.0,
    show_default=True,
    help="How long to count before each frame.",
)
@click.option("--once", is_flag=True, help="Print one frame, after one interval, and end.")
@click.option("--json", "as_json", is_flag=True, help="For scripts, with --once: rates per second.")
@click.pass_obj
def top_command(path: str, interval: float, *, once: bool, as_json: bool) -> None:
    """Show partitions by what they do per second; Ctrl-C ends it."""
    if as_json and not once:
        raise click.UsageError("--json goes with --once")
    if not once and (not sys.stdout.isatty() or render.console().is_dumb_terminal):
        raise click.UsageError("this is no terminal that can be redrawn: --once prints one frame")
    with asking.operator(path) as operator:
        if once:
            _print_one(operator, interval, as_json=as_json)
        else:
            _show(operator, interval)


def _print_one(operator: BlockingOperator, interval: float, *, as_json: bool) -> None:
    rates = Rates()
    samples = _samples(operator, interval)
    rates.take(next(samples))
    sample = next(samples)
    lines = rates.take(sample)
    if as_json:
        fields = {"daemon": sample.daemon, "partitions": lines}
        click.echo(json.dumps(msgspec.to_builtins(fields), indent=2))
    else:
        render.show(frame(sample.daemon, lines, sys.maxsize))


def _show(operator: BlockingOperator, interval: float) -> None:
    """Until Ctrl-C, on a screen of its own; what was on the terminal comes back."""
    rates = Rates()
    console = render.console()
    with suppress(KeyboardInterrupt), Live(console=console, screen=True, auto_refresh=False) as live:
        for sample in _samples(operator, interval):
            lines = rates.take(sample)
            live.update(frame(sample.daemon, lines, console.height), refresh=True)


def _samples(operator: BlockingOperator, interval: float) -> Iterator[Sample]:
    """One at once and one after every `interval`."""
    while True:
        yield _sample(operator)
        time.sleep(interval)


def _sample(operator: BlockingOperator) -> Sample:
    daemon = operator.call(OperatorStatistics())
    partitions: dict[int, Counted] = {}
    for summary in asking.all_partitions(operator)[:ASKED_ABOUT]:
        try:
            view = operator.call(InspectPartition(partition_id=summary.partition_id))
        except WireError as error:
            if error.number != errno.ENOENT:  # it has ended since it was listed
                raise
        else:
            partitions[summary.partition_id] = Counted(view.summary, view.statistics.intercepts)
    return Sample(daemon, partitions)
