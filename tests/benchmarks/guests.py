"""What a first touch costs a guest: real memory, real memslots, and a VMM in C.

Owns this measurement. A touch is the time from the vCPU's exit until it may go on, without what KVM took to
make that memslot. It is held against a round trip of the blocking Python echo, with as many clients, in the
same place.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median, quantiles

from report import CONSOLE
from rich.table import Table
from running import Load, Place, cpu_seconds, daemon_command, server, this_process_at
from subjects import PYTHON_ECHO

from intercept_client.kvm import Coverage, KvmUnavailable, Machine, PartitionSetting
from intercept_protocol.messages import MmioGranularity
from interceptctl.guest.c_build import build_vmm
from interceptctl.guest.c_vmm import CVmm
from interceptctl.guest.programs import SWEEP

VCPUS = (1, 8)
PAGES = 128
"""Touched by each vCPU in a round; each is an intercept, and a memslot."""
FIRST_GFN, APART = 0x200, 0x200
ECHO_SECONDS = 0.2


@dataclass(frozen=True, slots=True)
class Round:
    """Microseconds: each touch without its memslot, each memslot, and the daemon's CPU for a touch."""

    touches: list[float]
    memslots: list[float]
    daemon_cpu: float


@dataclass(frozen=True, slots=True)
class Figures:
    """Microseconds of all rounds, and what each round's are in echoes of that round."""

    touches: list[float] = field(default_factory=list)
    memslots: list[float] = field(default_factory=list)
    daemon_cpu: list[float] = field(default_factory=list)
    """For a touch, by round."""
    echoes: list[float] = field(default_factory=list)
    in_echoes: list[tuple[float, float]] = field(default_factory=list)
    """Median and 99th percentile, over the echo's median."""

    def add(self, found: Round, echo: float) -> None:
        self.touches.extend(found.touches)
        self.memslots.extend(found.memslots)
        self.daemon_cpu.append(found.daemon_cpu)
        self.echoes.append(echo)
        self.in_echoes.append((median(found.touches) / echo, _p99(found.touches) / echo))


Measured = Mapping[str, Figures]
"""By a title: how memory is covered, how many vCPUs, where."""


def measure(scratch: Path, load: Load, rounds: int) -> Measured:
    """Nothing, and a line that says why, without KVM or a compiler."""
    if not load.in_c:
        CONSOLE.print("guests: left out: gcc is missing")
        return {}
    try:
        Machine.open().close()
    except KvmUnavailable as why:
        CONSOLE.print(f"guests: left out: {why}")
        return {}
    binary = build_vmm(scratch)
    figures: dict[str, Figures] = {}
    for place in Place:
        with ExitStack() as running:
            daemon = scratch / f"guests-{place.name}.sock"
            echo = scratch / f"guests-echo-{place.name}.sock"
            running.enter_context(this_process_at(place))
            process = running.enter_context(server(daemon_command(daemon), daemon, place))
            running.enter_context(server([*PYTHON_ECHO, echo], echo, place))
            for _ in range(rounds):
                for vcpus in VCPUS:
                    for coverage in Coverage:
                        of_it = figures.setdefault(_title(coverage, vcpus, place), Figures())
                        trip = load.measure("echo", echo, place, "-v", vcpus, "-t", ECHO_SECONDS).p50
                        of_it.add(_touched(binary, daemon, process.pid, coverage, vcpus), trip)
    return figures


def show(measured: Measured) -> None:
    columns = ("", "median us", "p99 us", "memslot us", "daemon's CPU us", "in echoes (least)", "p99 (least)")
    table = Table(
        *columns, title="a guest's first touch, VMM in C, without its memslot", title_justify="left"
    )
    for name, of_it in measured.items():
        medians, tails = zip(*of_it.in_echoes, strict=True)
        table.add_row(
            name,
            f"{median(of_it.touches):.0f}",
            f"{_p99(of_it.touches):.0f}",
            f"{median(of_it.memslots):.0f}",
            f"{median(of_it.daemon_cpu):.0f}",
            f"{median(medians):.1f} ({min(medians):.1f})",
            f"{median(tails):.0f} ({min(tails):.0f})",
        )
    if measured:
        CONSOLE.print(table)


def as_json(measured: Measured) -> dict[str, object]:
    return {
        name: {
            "p50": median(of_it.touches),
            "p99": _p99(of_it.touches),
            "memslot": median(of_it.memslots),
            "daemon_cpu": median(of_it.daemon_cpu),
            "echo": median(of_it.echoes),
            "p50_in_echoes": median(middle for middle, _ in of_it.in_echoes),
            "p99_in_echoes": median(tail for _, tail in of_it.in_echoes),
        }
        for name, of_it in measured.items()
    }


def _touched(binary: Path, daemon: Path, daemon_pid: int, coverage: Coverage, vcpus: int) -> Round:
    setting = PartitionSetting(coverage=coverage, mmio_granularity=MmioGranularity.PAGE)
    with CVmm(binary, str(daemon), setting) as vmm:
        for index in range(vcpus):
            bar = vmm.add_bar(PAGES, at=FIRST_GFN + index * APART)
            vmm.add_vcpu(SWEEP, esi=bar.gpa, ecx=PAGES, ebx=1)
        spent = cpu_seconds(daemon_pid)
        vmm.start()
        vmm.wait()
        spent = cpu_seconds(daemon_pid) - spent
        tallies = [vcpu.tally for vcpu in vmm.vcpus]
    pairs = [
        (total * 1e6, memslot * 1e6)
        for tally in tallies
        for total, memslot in zip(tally.first_touches, tally.memslot_times, strict=True)
        if memslot  # the program's own page has none
    ]
    if len(pairs) != vcpus * PAGES:
        raise RuntimeError(f"{len(pairs)} first touches of {vcpus * PAGES} pages")
    return Round(
        [total - memslot for total, memslot in pairs],
        [memslot for _, memslot in pairs],
        spent * 1e6 / len(pairs),
    )


def _title(coverage: Coverage, vcpus: int, place: Place) -> str:
    return f"{coverage.name.lower()}, {vcpus} vCPU{'s' * (vcpus > 1)}, {place.value}"


def _p99(values: Sequence[float]) -> float:
    return quantiles(values, n=100)[-1]
