"""`make bench-scale`: what grows with what, how steeply, and how much memory each thing takes.

Every point is measured between two runs of the smallest, and shown as a ratio to their mean: the machine may
do other things meanwhile. A daemon lives for one point; both ends are on one CPU. Needs gcc.
"""

from __future__ import annotations

import math
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import mean, median

import batches
import click
import first_touches
import inside
import longest_step
from report import CONSOLE
from rich.table import Table
from running import Load, Place, Sample, daemon_command, resident_kib, server, wait_connectable

from intercept_client import BlockingOperator

FLAT, LINEAR = 1.25, 6.0
"""What a curve grows by at ten times the size, up to which it is called flat, and from which linear."""


@dataclass(frozen=True, slots=True)
class Curve:
    """`points` are sizes, of which `options` makes what the load generator sets up."""

    name: str
    scenario: str
    points: tuple[int, ...]
    options: tuple[str, ...]
    field: str = "p50"

    def options_at(self, size: int) -> list[str]:
        """`{n}` stands for the size; steps of a prime, so that neighbours are not asked for in turn."""
        return [option.format(n=size) for option in self.options]


def curves(most: int) -> list[Curve]:
    decades = tuple(10**power for power in range(1, 7) if 10**power <= most)
    extents = tuple(size for size in decades if size <= 100_000)
    many = ("-g", "1", "-r", "{n}", "-s", "7919")
    mapped = (*many, "-m", "{n}")
    return [
        Curve("look-up among n regions", "permission", decades, mapped),
        Curve("adding a region to n", "permission", decades, many, "setup_us"),
        Curve("already mapped, among n extents", "already_mapped", extents, mapped),
        Curve("first touch among n extents", "first_touch", extents, mapped),
        Curve("invalidation of a page among n extents", "invalidate", extents, mapped),
        Curve("first touch in a VMA cut in n", "first_touch", (1, 100, 10_000), ("-g", "20000", "-c", "{n}")),
        Curve("n VPs, time an answer", "already_mapped", (1, 8, 64, 256, 1024), ("-v", "{n}"), "rate"),
        Curve("256 VPs in n partitions", "already_mapped", (1, 16, 256), ("-v", "256", "-p", "{n}"), "rate"),
    ]


@click.command()
@click.option("--most", default=1_000_000, show_default=True, help="The largest size.")
@click.option("--seconds", default=1.0, show_default=True, help="Each point is measured for so long.")
def main(most: int, seconds: float) -> None:
    """Measure the curves, the memory, how long others wait while 64 VPs are busy, and the longest steps."""
    with tempfile.TemporaryDirectory(prefix="interceptd-scale-") as directory:
        load = Load(Path(directory))
        if not load.in_c:
            raise click.ClickException(
                "gcc is missing: the scale is measured by the load generator in C alone"
            )
        _show_inside(most)
        _show_memory(Path(directory), load)
        for curve in curves(most):
            _show_curve(curve, _measure_curve(curve, Path(directory), load, seconds))
        batches.show(Path(directory))
        first_touches.show(Path(directory), most)
        _show_lag(Path(directory), load)
        _show_two_daemons(Path(directory), load)
        longest_step.show(most)


# ------------------------------------------------ curves


def _measure_curve(
    curve: Curve, scratch: Path, load: Load, seconds: float
) -> dict[int, tuple[float, Sample]]:
    """By size: the cost over that of the smallest size, and what was measured."""

    def point(size: int) -> Sample:
        with _daemon(scratch, Place.ONE_CPU) as path:
            return load.measure(curve.scenario, path, Place.ONE_CPU, "-t", seconds, *curve.options_at(size))

    smallest = curve.points[0]
    before = point(smallest)
    found = {smallest: (1.0, before)}
    for size in curve.points[1:]:
        sample = point(size)
        after = point(smallest)
        found[size] = (_cost(sample, curve) / mean([_cost(before, curve), _cost(after, curve)]), sample)
        before = after
    return found


def _cost(sample: Sample, curve: Curve) -> float:
    figure = float(getattr(sample, curve.field))
    return 1e6 / figure if curve.field == "rate" else figure


def _show_curve(curve: Curve, found: dict[int, tuple[float, Sample]]) -> None:
    table = Table(
        "n", "us", "x the smallest", "p99 us", "max/median VP", title=curve.name, title_justify="left"
    )
    for size, (growth, sample) in found.items():
        row = (f"{_cost(sample, curve):.1f}", f"{growth:.2f}", f"{sample.p99:.0f}", f"{sample.fairness:.2f}")
        table.add_row(f"{size:,}", *row)
    decades = math.log10(curve.points[-1] / curve.points[0])
    tenfold = found[curve.points[-1]][0] ** (1 / decades)
    slope = "flat" if tenfold <= FLAT else "linear" if tenfold >= LINEAR else "below linear"
    CONSOLE.print(table)
    CONSOLE.print(f"ten times as many: x {tenfold:.2f}, {slope}\n")


def _show_inside(most: int) -> None:
    sizes = [size for size in (10, 1_000, 100_000, 1_000_000) if size <= most]
    table = Table("among n regions", *(f"{size:,}" for size in sizes), "x from first to last")
    table.title, table.title_justify = "the core alone, CPU us", "left"
    found = [inside.measure(size) for size in sizes]
    for name in found[0]:
        costs = [figures[name] for figures in found]
        table.add_row(name, *(f"{cost:.1f}" for cost in costs), f"{costs[-1] / costs[0]:.2f}")
    CONSOLE.print(table)
    cost, calls = inside.first_touch_of_a_gib()
    CONSOLE.print(f"first touch of 1 GiB: one intercept, {cost:.0f} us of CPU, {calls} map calls\n")


# ------------------------------------------------ memory, lag, two daemons


def _show_memory(scratch: Path, load: Load) -> None:
    table = Table("", "of them", "KiB each", title="memory of the daemon", title_justify="left")
    regions = ("-g", "1", "-r", "20000")
    for name, count, options in (
        ("partition", 256, ("-v", "256", "-p", "256")),
        ("VP", 256, ("-v", "256")),
        ("region", 20_000, (*regions, "-m", "1")),
        ("extent, mapped and in the software table", 20_000, (*regions, "-m", "20000")),
    ):
        with _daemon(scratch, Place.ANY_CPU) as path, load.holding(path):
            pid = int(path.with_suffix(".pid").read_text())
            before = resident_kib(pid)
            with load.holding(path, *options):
                table.add_row(name, f"{count:,}", f"{(resident_kib(pid) - before) / count:.2f}")
    CONSOLE.print(table)
    CONSOLE.print("a partition is counted with its region and a VP; an extent with its region\n")


def _show_lag(scratch: Path, load: Load) -> None:
    """How long an operator waits for an answer, alone and while 64 VPs ask as fast as they can."""
    table = Table(
        "an operator's question, ms", "median", "most", title="event-loop lag", title_justify="left"
    )
    with _daemon(scratch, Place.ANY_CPU) as path:
        table.add_row("idle", *_waits(path, partial(time.sleep, 1)))
        for name, scenario, options in (
            ("64 VPs", "already_mapped", ("-v", 64, "-t", 2)),
            ("50,000 regions come and go", "permission", ("-g", 1, "-r", 50_000)),
        ):
            busy = partial(load.measure, scenario, path, Place.ANY_CPU, *options)
            table.add_row(name, *_waits(path, busy))
    CONSOLE.print(table)


def _waits(path: Path, act: Callable[[], object]) -> tuple[str, str]:
    thread = threading.Thread(target=act)
    waits = []
    with BlockingOperator.open(path.with_name("operator.sock")) as operator:
        thread.start()
        while thread.is_alive():
            asked = time.perf_counter()
            operator.statistics()
            waits.append((time.perf_counter() - asked) * 1e3)
            time.sleep(0.002)
    return f"{median(waits):.2f}", f"{max(waits):.1f}"


def _show_two_daemons(scratch: Path, load: Load) -> None:
    """64 VPs on one daemon, and the same on two daemons: what the systemd template is for."""
    together = []
    alone = []
    with ExitStack() as running:
        paths = [running.enter_context(_daemon(scratch, Place.ANY_CPU)) for _ in range(2)]
        for _ in range(5):
            alone.append(_rate(load, paths[:1] * 2))
            together.append(_rate(load, paths))
    growth = median(two / one for one, two in zip(alone, together, strict=True))
    CONSOLE.print(f"two daemons answer {growth:.2f} x what one does, 2 x 32 VPs, load on the same CPUs")


def _rate(load: Load, paths: list[Path]) -> float:
    rates: list[float] = []

    def ask(path: Path) -> None:
        rates.append(load.measure("already_mapped", path, Place.ANY_CPU, "-v", 32, "-t", 1).rate)

    threads = [threading.Thread(target=ask, args=[path]) for path in paths]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(rates)


@contextmanager
def _daemon(scratch: Path, place: Place) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir=scratch) as directory:
        path = Path(directory) / "vmm.sock"
        with server(daemon_command(path), path, place) as process:
            path.with_suffix(".pid").write_text(str(process.pid))
            wait_connectable(process, path.with_name("operator.sock"))
            yield path


if __name__ == "__main__":
    main()
