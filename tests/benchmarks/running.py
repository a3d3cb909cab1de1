"""The parts that every measurement is made of: a build, servers as processes, one run of a load generator.

Owns processes and where they run. Must not know what is compared with what.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from functools import partial
from pathlib import Path

import click

from interceptctl.private_environment import private_environment

HERE = Path(__file__).parent
HEADER = HERE.parents[1] / "clients" / "c"
START_SECONDS = 20
ROOM = """[limits]
partitions_per_uid = 512
vmms_per_uid = 512
control_requests_per_second = 1000000
"""
Command = Sequence[str | Path]


class Place(Enum):
    """Which CPUs both ends of a measurement run on."""

    ONE_CPU = "one CPU"
    ANY_CPU = "unpinned"

    @property
    def before_exec(self) -> Callable[[], None] | None:
        return partial(os.sched_setaffinity, 0, {CPU}) if self is Place.ONE_CPU else None


CPU = min(os.sched_getaffinity(0))


@dataclass(frozen=True, slots=True)
class Sample:
    """What one run of a load generator measured: microseconds, but for `rate`, answers a second, and
    `fairness`, the most that a VP was answered over their median."""

    rate: float
    p50: float
    p99: float
    max: float
    fairness: float
    setup_us: float


class Load:
    """The load generator: `in_c` says which one."""

    def __init__(self, scratch: Path) -> None:
        self.in_c = shutil.which("gcc") is not None
        self._python: Command = [sys.executable, HERE / "python_load.py"]
        self._command: Command = [build(scratch, "load.c")] if self.in_c else self._python

    def measure(
        self, scenario: str, path: Path, place: Place, *options: object, by_python: bool = False
    ) -> Sample:
        command = self._python if by_python else self._command
        done = subprocess.run(
            [*command, *map(str, options), scenario, path],
            check=False,
            capture_output=True,
            text=True,
            preexec_fn=place.before_exec,
        )
        if done.returncode:
            raise click.ClickException(f"load {scenario} {options}: {done.stderr.strip()[-400:]}")
        return Sample(**json.loads(done.stdout))

    def measure_once_ready(
        self, scenario: str, path: Path, place: Place, *options: object, ready: Callable[[], None]
    ) -> Sample:
        """Call `ready` between the set-up and what is measured. In C only."""
        command = [*self._command, "-w", *map(str, options), scenario, path]
        with subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            preexec_fn=place.before_exec,  # noqa: PLW1509 - no other thread runs here
        ) as process:
            assert process.stdout is not None
            if process.stdout.readline() == b"ready\n":
                ready()
            measured, _ = process.communicate()
        if process.returncode:
            raise click.ClickException(f"load {scenario} {options} ended with status {process.returncode}")
        return Sample(**json.loads(measured))

    @contextmanager
    def holding(self, path: Path, *options: object) -> Iterator[None]:
        """What the load generator connects and sets up, held until the end of the block. In C only."""
        command = [*self._command, *map(str, options), "hold", path]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
            assert process.stdin is not None
            assert process.stdout is not None
            if process.stdout.readline() != b"ready\n":
                raise click.ClickException(f"load hold {options} did not get ready")
            yield
            process.stdin.close()


def build(scratch: Path, source: str) -> Path:
    binary = scratch / Path(source).stem
    command: list[str | Path] = ["gcc", "-O2", "-pthread", f"-I{HEADER}", "-o", binary, HERE / source]
    subprocess.run(command, check=True)
    return binary


@contextmanager
def server(command: Command, path: Path, place: Place) -> Iterator[subprocess.Popen[bytes]]:
    """A server that can be connected to when the block begins, and is gone after it."""
    process = subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=private_environment(),
        preexec_fn=place.before_exec,  # noqa: PLW1509 - no threads here
    )
    try:
        wait_connectable(process, path)
        yield process
    finally:
        process.kill()
        process.wait()


@contextmanager
def kept_daemon(
    path: Path, place: Place, environment: Mapping[str, str] | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """A daemon with a keeper, which the block gets; both are gone after it."""
    keeper = subprocess.Popen(
        daemon_command(path, "keep", "--"),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=environment or private_environment(),
        preexec_fn=place.before_exec,  # noqa: PLW1509 - no threads here
    )
    try:
        wait_connectable(keeper, path)
        yield keeper
    finally:
        keeper.terminate()
        keeper.wait()


@contextmanager
def this_process_at(place: Place) -> Iterator[None]:
    """This process, and what it starts."""
    allowed = os.sched_getaffinity(0)
    if place is Place.ONE_CPU:
        os.sched_setaffinity(0, {CPU})
    yield
    os.sched_setaffinity(0, allowed)


def child_of(keeper: subprocess.Popen[bytes]) -> int:
    return int(Path(f"/proc/{keeper.pid}/task/{keeper.pid}/children").read_text())


def daemon_command(path: Path, *keep: str) -> list[str | Path]:
    """Without a log, and with room for what the scale asks for."""
    configuration = path.with_suffix(".toml")
    configuration.write_text(ROOM)
    return [sys.executable, "-m", "interceptd", *keep, "serve", "--socket", path, "--config", configuration]


def cpu_seconds(pid: int) -> float:
    """What a process has taken of the CPU, all its threads together."""
    clock = (~pid << 3) | 2  # clock_getcpuclockid(3): MAKE_PROCESS_CPUCLOCK, CPUCLOCK_SCHED
    return time.clock_gettime(clock)


def resident_kib(pid: int) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS:"))


def wait_connectable(process: subprocess.Popen[bytes], path: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while True:
        with socket.socket(socket.AF_UNIX) as probe:
            try:
                probe.connect(str(path))
            except OSError:
                if time.monotonic() > deadline or process.poll() is not None:
                    raise click.ClickException(f"{process.args!r} does not listen") from None
            else:
                return
        time.sleep(0.002)
