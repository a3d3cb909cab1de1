"""What a recording costs the VPs that are recorded, and how large it becomes.

Owns these measurements and their table; part of `make bench`. Can be run by itself: `recording.py 1000000`
also records so many intercepts.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Final, NamedTuple

from report import CONSOLE
from rich.table import Table
from running import Command, Load, Place, Sample, daemon_command, server

from intercept_client import BlockingOperator

ROUNDS: Final = 9
SECONDS: Final = 0.5
SCENARIOS: Final = ("already_mapped", "first_touch")


class Run(NamedTuple):
    """A run of the load: `options` are its own."""

    load: Load
    scenario: str
    socket: Path
    place: Place
    options: Sequence[object]
    file: Path


class Written(NamedTuple):
    """One recording."""

    intercepts: int
    bytes: int
    seconds: float
    told: str
    """What `interceptctl record` said of it."""


@dataclass(frozen=True, slots=True)
class Costs:
    """By scenario and VPs: (recorded, not recorded), by round."""

    requests: Mapping[str, Sequence[tuple[Sample, Sample]]]
    written: Written | None


def measure(scratch: Path, load: Load, place: Place = Place.ANY_CPU, intercepts: int = 0) -> Costs:
    """In C only: with no load in C there is nothing to compare."""
    requests: dict[str, list[tuple[Sample, Sample]]] = {}
    if not load.in_c:
        return Costs(requests, None)
    with ExitStack() as running:
        socket = Path(running.enter_context(TemporaryDirectory(dir=scratch)), "vmm.sock")
        running.enter_context(server(daemon_command(socket), socket, place))
        for turn in range(ROUNDS):
            for scenario in SCENARIOS:
                for vps in (1, 8) if scenario == "already_mapped" else (1,):
                    run = Run(load, scenario, socket, place, ("-v", vps, "-t", SECONDS), scratch / "run.rec")
                    took: dict[bool, Sample] = {}
                    for is_recorded in (bool(turn % 2), not turn % 2):
                        took[is_recorded] = _measured(run, is_recorded=is_recorded)[0]
                    found = requests.setdefault(f"{scenario}, {vps} VP{'s' * (vps > 1)}", [])
                    found.append((took[True], took[False]))
        written = None
        if intercepts:
            rate = requests["already_mapped, 8 VPs"][-1][0].rate
            seconds = 1.1 * intercepts / rate
            options = ("-v", 8, "-t", seconds)
            run = Run(load, "already_mapped", socket, place, options, scratch / "run.rec")
            sample, written = _measured(run, is_recorded=True)
            assert written is not None
            written = written._replace(intercepts=int(sample.rate * seconds))
    return Costs(requests, written)


def show(costs: Costs) -> None:
    table = Table(
        "", "recorded, us", "p99", "not recorded", "p99", "p50 ratio", "p99 ratio", title_justify="left"
    )
    table.title = "an intercept while its partition is recorded, and while not: medians"
    for name, rounds in costs.requests.items():
        recorded, plain = ([pair[side] for pair in rounds] for side in (0, 1))
        table.add_row(
            name,
            *(
                f"{median(value):.1f}"
                for samples in (recorded, plain)
                for value in ([each.p50 for each in samples], [each.p99 for each in samples])
            ),
            f"{median(on.p50 / off.p50 for on, off in rounds):.3f}",
            f"{median(on.p99 / off.p99 for on, off in rounds):.3f}",
        )
    CONSOLE.print(table)
    if costs.written is not None:
        size = costs.written.bytes / (1 << 20)
        CONSOLE.print(
            f"a recording of {costs.written.intercepts:,} intercepts: {size:.1f} MiB in "
            f"{costs.written.seconds:.1f} s; {costs.written.told}"
        )


def as_json(costs: Costs) -> dict[str, object]:
    return {
        name: [[on.p50, on.p99, off.p50, off.p99] for on, off in rounds]
        for name, rounds in costs.requests.items()
    }


def _measured(run: Run, *, is_recorded: bool) -> tuple[Sample, Written | None]:
    """One run of the load, recorded or not."""
    recorder: subprocess.Popen[str] | None = None

    def begin() -> None:
        nonlocal recorder
        recorder = _recording(run.socket, run.file) if is_recorded else None

    began = time.monotonic()
    sample = run.load.measure_once_ready(run.scenario, run.socket, run.place, *run.options, ready=begin)
    if recorder is None:
        return sample, None
    told, _ = recorder.communicate()
    written = Written(0, run.file.stat().st_size, time.monotonic() - began, told.strip().partition(": ")[2])
    run.file.unlink()
    return sample, written


def _recording(socket: Path, file: Path) -> subprocess.Popen[str]:
    """A recorder of the newest partition, which has begun."""
    operator_socket = socket.with_name("operator.sock")
    with BlockingOperator.open(operator_socket) as operator:
        newest = operator.list_partitions()[-1].partition_id
    command: Command = [sys.executable, "-m", "interceptctl", "--socket", operator_socket, "record", file]
    recorder = subprocess.Popen(
        [*command, "--partition", str(newest)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    while not file.exists() or file.stat().st_size == 0:
        if recorder.poll() is not None:
            raise RuntimeError(f"record ended with status {recorder.returncode}")
        time.sleep(0.01)
    return recorder


if __name__ == "__main__":
    with TemporaryDirectory(prefix="interceptd-bench-") as directory:
        wanted = int(sys.argv[1]) if len(sys.argv) > 1 else 0
        show(measure(Path(directory), Load(Path(directory)), intercepts=wanted))
