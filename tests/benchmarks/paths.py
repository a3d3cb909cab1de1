"""What a VMM waits for: a first touch, and an announced change, in round trips of a Python echo.

Owns these measurements and their table; part of `make bench`. Can be run by itself. The load is in C, on
declared memory, so that neither the client nor the kernel's part of a munmap counts; "live" says where it is
live. With the VMM's own hypervisor, the VMM answers each request at once and changes no memslot.

Beside them: what the kernel takes for the like. A region of libvfio-user is not measured: its C library is in
no package.
"""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Final, NamedTuple

from report import CONSOLE
from rich.table import Table
from running import Load, Place, Sample, build, daemon_command, server

from live import ECHOED_BYTES, echo

ROUNDS: Final = 7
SECONDS: Final = 0.3
ECHOES: Final = 1000

_PAGE: Final = ("-g", 1)
_VMM: Final = ("-h", 1)
_EIGHT: Final = ("-v", 8, "-p", 8)
_GIB_OF_RAM: Final = ("-k", 1, "-g", 1 << 18)
PATHS: Final[Mapping[str, tuple[str, *tuple[object, ...]]]] = {
    "first touch, software table": ("first_touch", *_PAGE),
    "first touch, the VMM's hypervisor": ("first_touch", *_PAGE, *_VMM),
    "the same, 8 partitions": ("first_touch", *_PAGE, *_VMM, *_EIGHT),
    "begin and end of a page, software table": ("announce", *_PAGE),
    "begin and end of a page, the VMM's hypervisor": ("announce", *_PAGE, *_VMM),
    "begin and end of a page, 8 partitions": ("announce", *_PAGE, *_VMM, *_EIGHT),
    "begin and end of 64 pieces, the VMM's hypervisor": ("announce", "-c", 64, *_VMM),
    "each 512 pages of a live GiB, software table": ("windows", *_GIB_OF_RAM, "-l", 1),
    "each 512 pages of a live GiB, the VMM's hypervisor": ("windows", *_GIB_OF_RAM, "-l", 1, *_VMM),
    "watched munmap until the guest has lost the page": ("munmap", *_GIB_OF_RAM, "-l", 2, *_VMM),
}
"""The scenario and the options of each."""
KERNEL_COSTS: Final = {
    "missing": "userfaultfd, a missing page served by another process",
    "memslot": "KVM adds a memslot",
    "munmap": "munmap of a page",
}
"""The arguments of `kernel_costs.c`, and what is measured."""


class Round(NamedTuple):
    """Microseconds."""

    echo: float
    taken: Mapping[str, Sample]
    kernel: Mapping[str, float | str]
    """By what is measured; why it cannot be, where that is so."""


def measure(scratch: Path, load: Load, place: Place) -> Sequence[Round]:
    """Each path once in every round. In C only: without a compiler there are no rounds."""
    rounds: list[Round] = []
    if not load.in_c:
        return rounds
    kernel_costs = build(scratch, "kernel_costs.c")
    with ExitStack() as running:
        socket = Path(running.enter_context(TemporaryDirectory(dir=scratch)), "vmm.sock")
        running.enter_context(server(daemon_command(socket), socket, place))
        for _ in range(ROUNDS):
            taken = {
                name: load.measure(scenario, socket, place, *options, "-t", SECONDS)
                for name, (scenario, *options) in PATHS.items()
            }
            kernel = {name: _kernel_cost(kernel_costs, what, place) for what, name in KERNEL_COSTS.items()}
            rounds.append(Round(_echo_time(place), taken, kernel))
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
    for name in KERNEL_COSTS.values():
        costs = [each.kernel[name] for each in rounds]
        if numbers := [
            (cost, each.echo) for cost, each in zip(costs, rounds, strict=True) if isinstance(cost, float)
        ]:
            medians = median(cost for cost, _ in numbers), median(cost / echo for cost, echo in numbers)
            table.add_row(name, f"{medians[0]:.1f}", f"{medians[1]:.1f}", "")
        else:
            table.add_row(name, str(costs[0]), "", "")
    CONSOLE.print(table)


def as_json(rounds: Sequence[Round]) -> list[dict[str, float]]:
    return [
        {
            "echo": each.echo,
            **{name: sample.p50 for name, sample in each.taken.items()},
            **{name: cost for name, cost in each.kernel.items() if isinstance(cost, float)},
        }
        for each in rounds
    ]


def _kernel_cost(command: Path, what: str, place: Place) -> float | str:
    """The median in microseconds, or why there is none."""
    done = subprocess.run(
        [command, what], check=True, capture_output=True, text=True, preexec_fn=place.before_exec
    )
    printed = done.stdout.strip()
    return printed.removeprefix("- ") if printed.startswith("-") else float(printed)


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
