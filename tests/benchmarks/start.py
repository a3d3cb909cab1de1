"""From exec to the first answered intercept, beside interpreters that do nothing and that only load trio.

Owns what is started, and the CPU and wall time that each start takes; part of `make bench`. Byte code is
kept, as in an installed package, whatever PYTHONDONTWRITEBYTECODE says: without it every start compiles.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import NamedTuple

import click
from declared import add_backed_region, create_partition
from report import CONSOLE
from rich.table import Table

from intercept_client import BlockingVmm, BlockingVp
from intercept_protocol.hv_message import build_memory_intercept
from intercept_protocol.outcomes import Access, Outcome
from interceptctl.private_environment import private_environment

ROUNDS = 15
PAGES = 512
READY_SECONDS = 20
MODULE = (sys.executable, "-m", "interceptd")
Environment = Mapping[str, str]


class Cost(NamedTuple):
    """Of one start, in seconds."""

    wall: float
    cpu: float


Costs = Mapping[str, list[Cost]]


def measure() -> Costs:
    with TemporaryDirectory(prefix="interceptd-start-") as directory:
        subjects = _subjects(Path(directory))
        for start in subjects.values():
            start()  # and keeps its byte code
        costs: dict[str, list[Cost]] = {name: [] for name in subjects}
        for _ in range(ROUNDS):
            for name, start in subjects.items():
                costs[name].append(start())
    return costs


def show(costs: Costs) -> None:
    title = "from exec to the first answer: median (least to most)"
    table = Table("", "wall ms", "CPU ms", title=title, title_justify="left")
    for name, taken in costs.items():
        wall, cpu = zip(*taken, strict=True)
        table.add_row(name, spread(wall), spread(cpu))
    CONSOLE.print(table)


def as_json(costs: Costs) -> dict[str, object]:
    return {name: [cost._asdict() for cost in taken] for name, taken in costs.items()}


def _subjects(scratch: Path) -> Mapping[str, Callable[[], Cost]]:
    kept = keeping_byte_code(scratch)
    none = {**kept, "PYTHONPYCACHEPREFIX": str(scratch / "none"), "PYTHONDONTWRITEBYTECODE": "1"}
    return {
        "an interpreter that does nothing": partial(_interpreter, kept, "import os; os._exit(0)"),
        "import trio": partial(_interpreter, kept, "import os, trio; os._exit(0)"),
        "interceptd serve": partial(start_daemon, kept, Path(sys.executable).with_name("interceptd")),
        "python -m interceptd serve": partial(start_daemon, kept, *MODULE),
        "python -m interceptd serve, no byte code": partial(start_daemon, none, *MODULE),
    }


def keeping_byte_code(scratch: Path) -> Environment:
    inherited = private_environment()
    inherited.pop("PYTHONDONTWRITEBYTECODE", None)
    return inherited | {"PYTHONPYCACHEPREFIX": str(scratch / "kept")}


def _interpreter(environment: Environment, program: str) -> Cost:
    """Until it exits: at once, without cleaning up, since a daemon that answers has not cleaned up either."""
    began = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-c", program], env=environment)
    cpu = _cpu_until_ended(process)
    return Cost(time.perf_counter() - began, cpu)


def start_daemon(environment: Environment, *command: str | Path) -> Cost:
    """Until its first answer. That it listens is heard as a service manager hears it: nobody polls."""
    with TemporaryDirectory() as directory, socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        path, notify = f"{directory}/vmm.sock", f"{directory}/notify.sock"
        manager.bind(notify)
        manager.settimeout(READY_SECONDS)
        began = time.perf_counter()
        process = subprocess.Popen(
            [*command, "serve", "--socket", path],
            env={**environment, "NOTIFY_SOCKET": notify},
            stderr=subprocess.DEVNULL,
        )
        try:
            manager.recv(4096)
            _first_touch(path)
            wall = time.perf_counter() - began
        finally:
            process.kill()
            cpu = _cpu_until_ended(process)
    return Cost(wall, cpu)


def _first_touch(path: str) -> None:
    """What a VMM has to say first, and the first page that its guest touches."""
    with BlockingVmm.open(path) as vmm:
        partition = create_partition(vmm)
        add_backed_region(vmm, 0, PAGES)
        with BlockingVp.open(path, partition, vp_index=0) as vp:
            answer = vp.intercept(build_memory_intercept(gpa=0, access=Access.READ))
    if answer.outcome is not Outcome.RESUME:
        raise click.ClickException(f"the first intercept was answered {answer}")


def _cpu_until_ended(process: subprocess.Popen[bytes]) -> float:
    """Of a process and the children that it waited for."""
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    return used.ru_utime + used.ru_stime


def spread(seconds: Iterable[float]) -> str:
    least, *_, most = ordered = sorted(1000 * value for value in seconds)
    return f"{median(ordered):.0f} ({least:.0f} to {most:.0f})"


if __name__ == "__main__":
    show(measure())
