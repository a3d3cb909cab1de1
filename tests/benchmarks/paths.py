"""What a VMM waits for: a first touch, and an announced change, in round trips of a Python echo.

Owns these measurements and their table; part of `make bench`. Can be run by itself. The load is in C, on
declared memory, so that neither the client nor the kernel's part of a munmap counts. With the VMM's own
hypervisor, the VMM answers each request at once and changes no memslot.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Final, NamedTuple

from report import CONSOLE
from rich.table import Table
from running import Load, Place, Sample, daemon_command, server

from live import ECHOED_BYTES, echo

ROUNDS: Final = 7
SECONDS: Final = 0.3
ECHOES: Final = 1000

_PAGE: Final = ("-g", 1)
_VMM: Final = ("-h", 1)
_EIGHT: Final = ("-v", 8, "-p", 8)
PATHS: Final[Mapping[str, tuple[str, *tuple[object, ...]]]] = {
    "first touch, software table": ("first_touch", *_PAGE),
    "first touch, the VMM's hypervisor": ("first_touch", *_PAGE, *_VMM),
    "the same, 8 partitions": ("first_touch", *_PAGE, *_VMM, *_EIGHT),
    "begin and end of a page, software table": ("announce", *_PAGE),
    "begin and end of a page, the VMM's hypervisor": ("announce", *_PAGE, *_VMM),
    "begin and end of 64 pieces, the VMM's hypervisor": ("announce", "-c", 64, *_VMM),
}
"""The scenario and the options of each."""


class Round(NamedTuple):
    """Microseconds."""

    echo: float
    taken: Mapping[str, Sample]


def measure(scratch: Path, load: Load, place: Place) -> Sequence[Round]:
    """Each path once in every round. In C only: without a compiler there are no rounds."""
    rounds: list[Round] = []
    if not load.in_c:
        return rounds
    with ExitStack() as running:
        socket = Path(running.enter_context(TemporaryDirectory(dir=scratch)), "vmm.sock")
        running.enter_context(server(daemon_command(socket), socket, place))
        for _ in range(ROUNDS):
            taken = {
                name: load.measure(scenario, socket, place, *options, "-t", SECONDS)
                for name, (scenario, *options) in PATHS.items()
            }
            rounds.append(Round(_echo_time(place), taken))
    return rounds


def show(rounds: Sequence[Round], place: Place) -> None:
    table = Table("", "median us", "in echoes", "p99 / median", title_justify="left")
    took = median(each.echo for each in rounds)
    table.title = f"what a VMM waits for, {place.value}: a Python echo takes {took:.1f} us"
    for name in PATHS:
        samples = [each.taken[name] for each in rounds]
        table.add_row(
            name,
            f"{median(each.p50 for each in samples):.1f}",
            f"{median(each.taken[name].p50 / each.echo for each in rounds):.1f}",
            f"{median(each.p99 / each.p50 for each in samples):.1f}",
        )
    CONSOLE.print(table)


def as_json(rounds: Sequence[Round]) -> list[dict[str, float]]:
    return [
        {"echo": each.echo, **{name: sample.p50 for name, sample in each.taken.items()}} for each in rounds
    ]


def _echo_time(place: Place) -> float:
    before = os.sched_getaffinity(0)
    if place.before_exec is not None:
        place.before_exec()
    try:
        with echo() as ask:
            taken = []
            for _ in range(ECHOES):
                began = time.perf_counter()
                ask(bytes(ECHOED_BYTES))
                taken.append(1e6 * (time.perf_counter() - began))
    finally:
        os.sched_setaffinity(0, before)
    return median(taken)


if __name__ == "__main__":
    with TemporaryDirectory(prefix="interceptd-bench-") as directory:
        for each_place in Place:
            show(measure(Path(directory), Load(Path(directory)), each_place), each_place)
