"""`make bench`: an intercept compared with other servers, interleaved in one run.

Compare ratios within one run, never times between runs. `--compare` holds those against a stored run's, and
ends with status 1 where one got worse. The start is measured last, as `start.py` alone does.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import click
import guests
import paths
import recording
import report
import restart
import restore
import start
from comparing import compared
from report import CONSOLE, Rounds
from running import Load, Place, Sample
from subjects import subjects

import live


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
        memory = live.measure(Path(directory), rounds)
        live.show(memory)
        touches = guests.measure(Path(directory), load, rounds)
        guests.show(touches)
        ways = {place: paths.measure(Path(directory), load, place) for place in Place}
        for place, way in ways.items():
            if way:
                paths.show(way, place)
        kept = restart.measure(Path(directory), load)
        restart.show(kept)
        recorded = recording.measure(Path(directory), load)
        recording.show(recorded)
        restored = restore.measure(Path(directory), load)
        restore.show(restored)
    starts = start.measure()
    start.show(starts)
    if json_file is not None:
        beside = {
            "live": live.as_json(memory),
            "guests": guests.as_json(touches),
            "start": start.as_json(starts),
            "restart": restart.as_json(kept),
            "paths": {place.value: paths.as_json(way) for place, way in ways.items()},
            "recording": recording.as_json(recorded),
            "restore": restore.as_json(restored),
        }
        figures = {"machine": facts, "results": report.as_json(results), **beside}
        json_file.write_text(json.dumps(figures) + "\n")
    if picture is not None:
        report.plot(results, picture)
    if baseline is not None:
        comparison = compared(results, report.from_json(json.loads(baseline.read_text())["results"]))
        CONSOLE.print("\n".join(comparison.lines))
        sys.exit(comparison.slower)


def _measure(scratch: Path, load: Load, place: Place, vps: int, *, rounds: int, seconds: float) -> Rounds:
    with subjects(scratch, load, place, alone=vps == 1) as found:
        figures: dict[str, list[Sample]] = {subject.name: [] for subject in found}
        for _ in range(rounds):
            for subject in found:
                figures[subject.name].append(subject.measure(load, place, vps, seconds))
    return figures


if __name__ == "__main__":
    main()
