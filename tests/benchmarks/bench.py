"""`make bench`: an intercept beside what else could have answered it, in one run, in turns.

Compare ratios within one run, never times between runs. `--compare` holds those against a stored run's, and
ends with status 1 where one got worse.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import click
import report
from report import CONSOLE, Rounds, ratio
from running import Load, Place, Sample
from subjects import subjects

import live

MOVED = 1.25
"""By how much a ratio may differ between two runs of the same code on a machine that does other things."""


@click.command()
@click.option("--rounds", default=7, show_default=True, help="Each subject is measured so often, in turn.")
@click.option("--seconds", default=0.3, show_default=True, help="For so long in each round.")
@click.option("--vps", "vp_counts", multiple=True, default=[1, 8, 64], show_default=True)
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write all figures there.")
@click.option("--plot", "picture", type=click.Path(path_type=Path), help="Draw them there (the bench extra).")
@click.option("--compare", "baseline", type=click.Path(path_type=Path, exists=True), help="A run's JSON.")
def main(
    *,
    rounds: int,
    seconds: float,
    vp_counts: tuple[int, ...],
    json_file: Path | None,
    picture: Path | None,
    baseline: Path | None,
) -> None:
    """Measure an intercept beside echoes in C, Python, trio, asyncio and uvloop, and beside gRPC."""
    results: dict[str, Rounds] = {}
    with tempfile.TemporaryDirectory(prefix="interceptd-bench-") as directory:
        load = Load(Path(directory))
        facts = report.machine(load_in_c=load.in_c)
        CONSOLE.print(facts)
        for place in Place:
            for vps in vp_counts:
                title = f"{vps} VP{'s' * (vps > 1)}, {place.value}"
                with tempfile.TemporaryDirectory(dir=directory) as scratch:
                    results[title] = _measure(Path(scratch), load, place, vps, rounds=rounds, seconds=seconds)
                report.show(title, results[title])
        live.show(live.measure(Path(directory), rounds))
    if json_file is not None:
        json_file.write_text(json.dumps({"machine": facts, "results": report.as_json(results)}) + "\n")
    if picture is not None:
        report.plot(results, picture)
    if baseline is not None:
        sys.exit(_compare(results, report.from_json(json.loads(baseline.read_text())["results"])))


def _measure(scratch: Path, load: Load, place: Place, vps: int, *, rounds: int, seconds: float) -> Rounds:
    with subjects(scratch, load, place, alone=vps == 1) as found:
        figures: dict[str, list[Sample]] = {subject.name: [] for subject in found}
        for _ in range(rounds):
            for subject in found:
                figures[subject.name].append(subject.measure(load, place, vps, seconds))
    return figures


def _compare(results: Mapping[str, Rounds], before: Mapping[str, Rounds]) -> int:
    """Say which ratios to the floor moved; 1 if one did for the worse."""
    worse = 0
    for title, figures in results.items():
        for name in figures.keys() & before.get(title, {}).keys():
            change = ratio(figures, name, "p50") / ratio(before[title], name, "p50")
            if not 1 / MOVED < change < MOVED:
                worse |= change > 1
                CONSOLE.print(f"{title}: {name}: the median is {change:.2f} of what it was, beside the floor")
    CONSOLE.print("slower than the baseline" if worse else "no slower than the baseline")
    return worse


if __name__ == "__main__":
    main()
