"""A daemon with a keeper beside one without: what each request costs more, and what a restart takes.

Owns these measurements and their table; part of `make bench`. Can be run by itself.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import NamedTuple

import click
import start
from declared import create_partition
from report import CONSOLE
from rich.table import Table
from running import Command, Load, Place, child_of, daemon_command, kept_daemon, resident_kib, server
from subjects import SERVERS

from intercept_client import BlockingVmm, BlockingVp, NewRegion
from intercept_protocol.addresses import GfnRange, UaddrRange
from intercept_protocol.hv_message import build_memory_intercept
from intercept_protocol.messages import RequestedKind
from intercept_protocol.outcomes import Access, Answer, Outcome

ROUNDS = 7
SECONDS = 0.3
HELD = 256
"""Connections whose memory is measured."""
LIST = 128
"""Regions of a request."""


class Setting(NamedTuple):
    """What the daemon has when it is killed."""

    name: str
    partitions: int = 1
    vps: int = 1
    """Of each partition."""
    regions: int = 1
    mappings: int = 1


SETTINGS = (
    Setting("a partition with a VP and a region"),
    Setting("1,024 VPs in 16 partitions", partitions=16, vps=64),
    Setting("10,000 regions and mappings", regions=10_000, mappings=10_000),
    Setting("100,000 regions", regions=100_000),
)


@dataclass(frozen=True, slots=True)
class Costs:
    """`requests`: by VPs and scenario, (with a keeper, without, the echo) in microseconds, by round. `starts`
    and `restarts` in seconds. `connection_kib`: with a keeper and without."""

    requests: Mapping[tuple[int, str], Sequence[tuple[float, float, float]]]
    starts: Sequence[float]
    restarts: Mapping[str, Sequence[float]]
    connection_kib: tuple[float, float] | None


def measure(scratch: Path, load: Load) -> Costs:
    requests: dict[tuple[int, str], list[tuple[float, float, float]]] = {}
    for vps in (1, 8, 64):
        requests |= _requests(scratch, load, vps)
    starts, restarts = _restarts(scratch)
    return Costs(requests, starts, restarts, _memory(scratch, load) if load.in_c else None)


def show(costs: Costs) -> None:
    table = Table("", "with a keeper, us", "without", "ratio", "more, in Python echoes", title_justify="left")
    table.title = f"requests with a keeper and without, {Place.ONE_CPU.value}: medians"
    for (vps, scenario), rounds in costs.requests.items():
        kept, unkept, _ = (median(column) for column in zip(*rounds, strict=True))
        ratio = median(with_keeper / without for with_keeper, without, _ in rounds)
        more = median((with_keeper - without) / echo for with_keeper, without, echo in rounds)
        name = f"{scenario}, {vps} VP{'s' * (vps > 1)}"
        table.add_row(name, f"{kept:.1f}", f"{unkept:.1f}", f"{ratio:.2f}", f"{more:+.2f}")
    CONSOLE.print(table)
    plain = median(costs.starts)
    table = Table("", "ms", "beside the start, ms", title_justify="left")
    table.title = "from a SIGKILL to the first answer of every partition: median (least to most)"
    table.add_row("a start, to its first answer", start.spread(costs.starts), "")
    for name, taken in costs.restarts.items():
        table.add_row(name, start.spread(taken), f"{1e3 * (median(taken) - plain):+.0f}")
    CONSOLE.print(table)
    if costs.connection_kib is not None:
        kept, unkept = costs.connection_kib
        CONSOLE.print(f"memory of a VP: {kept:.2f} KiB with a keeper, {unkept:.2f} without")


def as_json(costs: Costs) -> dict[str, object]:
    return {
        "requests": {f"{scenario}, {vps}": rounds for (vps, scenario), rounds in costs.requests.items()},
        "starts": costs.starts,
        "restarts": dict(costs.restarts),
        "connection_kib": costs.connection_kib,
    }


# ------------------------------------------------ requests


def _requests(scratch: Path, load: Load, vps: int) -> dict[tuple[int, str], list[tuple[float, float, float]]]:
    scenarios = ["already_mapped", *(["first_touch", "invalidate"] if load.in_c and vps == 1 else [])]
    found: dict[tuple[int, str], list[tuple[float, float, float]]] = {(vps, each): [] for each in scenarios}
    with ExitStack() as running:
        kept, unkept, echo = (
            Path(running.enter_context(TemporaryDirectory(dir=scratch)), "vmm.sock") for _ in range(3)
        )
        running.enter_context(kept_daemon(kept, Place.ONE_CPU))
        running.enter_context(server(daemon_command(unkept), unkept, Place.ONE_CPU))
        command: Command = [sys.executable, SERVERS / "python_echo.py", echo]
        running.enter_context(server(command, echo, Place.ONE_CPU))
        options = ("-v", vps, "-t", SECONDS)
        for turn in range(ROUNDS):
            for scenario in scenarios:
                took = {
                    path: load.measure(
                        "echo" if path is echo else scenario, path, Place.ONE_CPU, *options
                    ).p50
                    for path in ((kept, unkept, echo) if turn % 2 else (unkept, kept, echo))
                }
                found[vps, scenario].append((took[kept], took[unkept], took[echo]))
    return found


# ------------------------------------------------ restarts


def _restarts(scratch: Path) -> tuple[list[float], dict[str, list[float]]]:
    """A start, and a restart in each setting, in turn; the first of each keeps its byte code."""
    starts: list[float] = []
    restarts: dict[str, list[float]] = {setting.name: [] for setting in SETTINGS}
    with ExitStack() as running:
        environment = start.keeping_byte_code(scratch)
        guests = [running.enter_context(_guests(scratch, environment, setting)) for setting in SETTINGS]
        for turn in range(ROUNDS + 1):
            began = start.start_daemon(environment, *start.MODULE)
            took = [each.restart() for each in guests]
            if turn:
                starts.append(began.wall)
                for setting, seconds in zip(SETTINGS, took, strict=True):
                    restarts[setting.name].append(seconds)
    return starts, restarts


class Guests:
    """One VP of each partition of a kept daemon."""

    def __init__(self, keeper: subprocess.Popen[bytes], vps: Sequence[BlockingVp]) -> None:
        self._keeper = keeper
        self._vps = vps

    def restart(self) -> float:
        """Seconds from the death of the daemon until each was answered."""
        daemon = child_of(self._keeper)
        began = time.perf_counter()
        os.kill(daemon, signal.SIGKILL)
        for vp in self._vps:
            _touch(vp, 0)
        return time.perf_counter() - began


def _touch(vp: BlockingVp, gfn: int) -> None:
    answer: object = Answer.KICKED
    while answer is Answer.KICKED:  # once after each restart
        answer = vp.intercept(build_memory_intercept(gpa=gfn << 12, access=Access.READ))
    if not isinstance(answer, Answer) or answer.outcome is not Outcome.RESUME:
        raise click.ClickException(f"gfn {gfn:#x} was answered {answer}")


@contextmanager
def _guests(scratch: Path, environment: start.Environment, setting: Setting) -> Iterator[Guests]:
    with TemporaryDirectory(dir=scratch) as directory, ExitStack() as held:
        path = Path(directory, "vmm.sock")
        keeper = held.enter_context(kept_daemon(path, Place.ANY_CPU, environment))
        first = []
        for _ in range(setting.partitions):
            vmm = held.enter_context(BlockingVmm.open(path))
            partition = create_partition(vmm)
            _add_regions(vmm, setting.regions)
            vps = [
                held.enter_context(BlockingVp.open(path, partition, vp_index=index))
                for index in range(setting.vps)
            ]
            first.append(vps[0])
            for region in range(setting.mappings):
                _touch(vps[0], 2 * region)
        yield Guests(keeper, first)


def _add_regions(vmm: BlockingVmm, count: int) -> None:
    """Of a page each, with a gap between any two."""
    vmm.map_vma(UaddrRange(start=0, end=2 * count), 0, Access.READ | Access.WRITE, io=True)
    regions = [
        NewRegion(
            gfns=GfnRange.of(page, 1),
            uaddrs=UaddrRange(start=page, end=page + 1),
            kind=RequestedKind.MMIO,
            writable=True,
            executable=False,
        )
        for page in range(0, 2 * count, 2)
    ]
    for begin in range(0, count, LIST):
        vmm.add_regions(regions[begin : begin + LIST])


# ------------------------------------------------ memory


def _memory(scratch: Path, load: Load) -> tuple[float, float]:
    """KiB of a VP, with a keeper and without."""
    found = []
    for is_kept in (True, False):
        with TemporaryDirectory(dir=scratch) as directory, ExitStack() as running:
            path = Path(directory, "vmm.sock")
            if is_kept:
                pid = child_of(running.enter_context(kept_daemon(path, Place.ANY_CPU)))
            else:
                pid = running.enter_context(server(daemon_command(path), path, Place.ANY_CPU)).pid
            running.enter_context(load.holding(path))
            before = resident_kib(pid)
            with load.holding(path, "-v", HELD):
                found.append((resident_kib(pid) - before) / HELD)
    return found[0], found[1]


if __name__ == "__main__":
    with TemporaryDirectory(prefix="interceptd-restart-") as scratch_directory:
        show(measure(Path(scratch_directory), Load(Path(scratch_directory))))
