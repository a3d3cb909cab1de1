"""What a run leaves behind: tables, JSON, a picture.

Owns their form. Must not know how anything was measured.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from statistics import median

from rich.console import Console
from rich.table import Table
from running import Sample
from subjects import FLOOR, FLOOR_WITHOUT_GCC

Rounds = Mapping[str, list[Sample]]
"""A subject's name, and what it measured in each round."""
CONSOLE = Console(width=118)


def floor_of(figures: Rounds) -> str:
    return FLOOR if FLOOR in figures else FLOOR_WITHOUT_GCC


def ratio(figures: Rounds, name: str, field: str) -> float:
    """A subject's figure over the floor's of the same round, the median of all rounds."""
    pairs = zip(figures[name], figures[floor_of(figures)], strict=True)
    ratios: Iterator[float] = (getattr(own, field) / getattr(floor, field) for own, floor in pairs)
    return median(ratios)


def show(title: str, figures: Rounds) -> None:
    floor = floor_of(figures)
    columns = (
        "",
        "median us (least to most)",
        f"x {floor}",
        "p99 us",
        "answers/s",
        f"x {floor}",
        "max/median VP",
    )
    table = Table(*columns, title=title, title_justify="left")
    for name, samples in figures.items():
        medians = [sample.p50 for sample in samples]
        table.add_row(
            name,
            f"{median(medians):.1f} ({min(medians):.1f} to {max(medians):.1f})",
            f"{ratio(figures, name, 'p50'):.2f}",
            f"{median(sample.p99 for sample in samples):.0f}",
            f"{median(sample.rate for sample in samples):,.0f}",
            f"{ratio(figures, name, 'rate'):.2f}",
            f"{median(sample.fairness for sample in samples):.2f}",
        )
    CONSOLE.print(table)


def machine(*, load_in_c: bool) -> dict[str, object]:
    model = [
        line.split(":", 1)[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")
    ]
    return {
        "cpu": model[0] if model else platform.machine(),
        "cpus": len(os.sched_getaffinity(0)),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "load_generator": "C" if load_in_c else "Python: gcc is missing",
        "load_average": os.getloadavg()[0],
    }


def as_json(results: Mapping[str, Rounds]) -> dict[str, object]:
    return {
        title: {name: [asdict(sample) for sample in samples] for name, samples in figures.items()}
        for title, figures in results.items()
    }


def from_json(results: Mapping[str, Mapping[str, list[dict[str, float]]]]) -> dict[str, Rounds]:
    return {
        title: {name: [Sample(**sample) for sample in samples] for name, samples in figures.items()}
        for title, figures in results.items()
    }


def plot(results: Mapping[str, Rounds], picture: Path) -> None:
    """Medians over the floor's, a panel a setting. Raises ModuleNotFoundError without matplotlib."""
    import matplotlib as mpl  # noqa: PLC0415 - of the bench extra

    mpl.use("Agg")
    from matplotlib import pyplot, ticker  # noqa: PLC0415

    columns = 2
    rows = -(-len(results) // columns)
    figure, panels = pyplot.subplots(rows, columns, figsize=(12, 3.2 * rows), squeeze=False)
    for panel, (title, figures) in zip(panels.flat, results.items(), strict=False):
        names = list(figures)[::-1]
        ours = ["#1b6ca8" if "echo" not in name and "grpc" not in name else "#b0b0b0" for name in names]
        values = [ratio(figures, name, "p50") for name in names]
        bars = panel.barh(names, values, color=ours)
        panel.bar_label(bars, [f"{value:.1f}" for value in values], padding=2, fontsize=7)
        panel.set_xscale("log")
        panel.xaxis.set_major_formatter(ticker.StrMethodFormatter("{x:g}"))
        panel.xaxis.set_minor_formatter(ticker.NullFormatter())
        panel.set_title(f"{title}: median round trip, times {floor_of(figures)}", fontsize=9)
        panel.tick_params(labelsize=7)
        panel.margins(x=0.15)
    figure.tight_layout()
    figure.savefig(picture, dpi=80)


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines()
