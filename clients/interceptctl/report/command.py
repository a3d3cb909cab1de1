"""`interceptctl report`: its options, and the files that it writes.

Owns the command line. Must not know what is in the page or the trace.
"""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Final

import click

from interceptctl import operator_client, recordings

if TYPE_CHECKING:
    from .history import History

_NEEDED: Final = ("numpy", "perfetto", "plotly")


@click.command("report")
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path))
@click.option(
    "-o",
    "--output",
    metavar="HTML",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Write a page to look at.",
)
@click.option(
    "--perfetto",
    metavar="OUT",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Write a trace for ui.perfetto.dev.",
)
@click.option("--partial", is_flag=True, help="Show what comes before the damage of a damaged file.")
@click.option("--json", "as_json", is_flag=True, help="Print counts and percentiles, as JSON.")
def report_command(
    *, file: Path, output: Path | None, perfetto: Path | None, partial: bool, as_json: bool
) -> None:
    """Show a recording: what its guest did, and when.

    FILE is what `interceptctl record` wrote. The page needs no network: intercepts over time by gfn and
    answer, invalidations, regions, what was mapped, latency by stage, the busiest pages, gaps. The trace has
    a track for each VP, for the region lock and for invalidations.

    It needs an extra: pip install 'interceptd[report]'
    """
    if output is None and perfetto is None and not as_json:
        raise click.UsageError("say what to make: -o HTML, --perfetto OUT, --json, or all of them")
    missing = [name for name in _NEEDED if find_spec(name) is None]
    if missing:
        raise operator_client.Failure(
            f"report needs {', '.join(missing)}: run pip install 'interceptd[report]'"
        )
    from . import page, summary, trace_events  # noqa: PLC0415 - of the extra

    history, damage = _read(file, partial=partial)
    if output is not None:
        with recordings.created(output) as out:
            out.writelines(part.encode() for part in page.page(history, damage))
    if perfetto is not None:
        with recordings.created(perfetto) as out:
            trace_events.write_trace(history, out)
    if as_json:
        click.echo(json.dumps(summary.summary(history, damage), indent=2))


def _read(file: Path, *, partial: bool) -> tuple[History, str | None]:
    from .history_reader import UnknownWord, history_of  # noqa: PLC0415 - of the extra

    with recordings.opened(file, partial=partial) as recording:
        try:
            history = history_of(recording.header, recording.chunks())
        except UnknownWord as error:
            raise operator_client.Failure(f"{file}: {error}") from error
        return history, recording.damage
