"""`make bench`: an intercept beside the bare socket, in one run, in turns.

Owns the subjects, the rounds and the report. Compare ratios within one run, never times between runs.
Every figure is of the load generator in C; the median of the rounds is shown, with their spread.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import click
from rich.console import Console
from rich.table import Table

from intercept_client import BlockingVmm
from intercept_protocol import codec, rpc
from intercept_protocol.messages import (
    AddRegion,
    AddressSpaceKind,
    CreatePartition,
    CreatePartitionReply,
    HelloVp,
    HypervisorKind,
    MapVma,
)

HERE = Path(__file__).parent
FIRST_GFN = 0x100
REGION_GFNS = 512
MAPPED_GFNS = 8


@dataclass(frozen=True, slots=True)
class Subject:
    """A server under load: `hellos` has a line a VP, `gfns` is what the VPs rotate over."""

    name: str
    socket: Path
    hellos: Path
    count: int


@dataclass(frozen=True, slots=True)
class Figures:
    """Of one subject, each list a round: answers a second, microseconds."""

    rate: list[float]
    p50: list[float]
    p99: list[float]
    fairness: list[float]


@click.command()
@click.option("--rounds", default=5, show_default=True, help="Each subject is measured so often, in turn.")
@click.option("--count", default=20_000, show_default=True, help="Intercepts a round, of all VPs together.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write all figures there.")
def main(rounds: int, count: int, json_file: Path | None) -> None:
    """Measure an intercept that is answered on the spot against a C echo and a plain trio echo."""
    if shutil.which("gcc") is None:
        raise click.ClickException("gcc is missing: the load generator is built on the spot")
    results: dict[str, dict[str, Figures]] = {}
    with tempfile.TemporaryDirectory(prefix="interceptd-bench-") as directory:
        scratch = Path(directory)
        load = _build("load", scratch)
        floor = _build("floor", scratch)
        for pinned in (True, False):
            for vps in (1, 8, 64):
                title = f"{vps} VP{'s' if vps > 1 else ''}, {'one CPU' if pinned else 'unpinned'}"
                with ExitStack() as running:
                    subjects = running.enter_context(_subjects(scratch, floor, vps, pinned, count))
                    results[title] = _measure(load, subjects, rounds, pinned)
                _show(title, results[title])
    if json_file is not None:
        json_file.write_text(
            json.dumps({"machine": _machine(), "results": results}, default=_as_dict, indent=1)
        )


def _build(name: str, scratch: Path) -> Path:
    binary = scratch / name
    subprocess.run(["gcc", "-O2", "-pthread", "-o", binary, HERE / f"{name}.c"], check=True)
    return binary


@contextmanager
def _subjects(scratch: Path, floor: Path, vps: int, pinned: bool, count: int) -> Iterator[list[Subject]]:
    each = max(count // vps, 100)
    no_hellos = scratch / "no-hellos"
    no_hellos.write_text("\n" * vps)
    with tempfile.TemporaryDirectory(dir=scratch) as directory, ExitStack() as running:
        place = Path(directory)
        echoes: dict[str, list[str | Path]] = {
            "C echo": [floor, place / "c"],
            "trio echo": [sys.executable, HERE / "trio_echo.py", place / "trio"],
        }
        subjects = []
        for name, command in echoes.items():
            running.enter_context(_process(command, Path(command[-1]), pinned))
            subjects.append(Subject(name, Path(command[-1]), no_hellos, each))
        vmm_socket = place / "vmm.sock"
        daemon: list[str | Path] = [sys.executable, "-m", "interceptd", "serve", "--socket", vmm_socket]
        running.enter_context(_process(daemon, vmm_socket, pinned))
        for name, mapped in (("already_mapped", True), ("no_region", False)):
            vmm = running.enter_context(BlockingVmm.open(str(vmm_socket), name=name))
            hellos = place / name
            hellos.write_text(_hellos(vmm, vps, mapped))
            subjects.append(Subject(name, vmm_socket, hellos, each))
        yield subjects


def _hellos(vmm: BlockingVmm, vps: int, mapped: bool) -> str:
    """A partition, with the region that is asked for or without; returns its VPs' hellos, a line each."""
    partition = vmm.call(
        CreatePartition(address_space=AddressSpaceKind.DECLARED, hypervisor=HypervisorKind.SOFTWARE)
    )
    if mapped:
        vmm.call(
            MapVma(
                start_uaddr=0,
                page_count=REGION_GFNS,
                start_pfn=0,
                readable=True,
                writable=True,
                executable=False,
                io=True,
            )
        )
        vmm.call(
            AddRegion(
                start_gfn=FIRST_GFN,
                page_count=REGION_GFNS,
                start_uaddr=0,
                kind="mmio",
                writable=True,
                executable=False,
            )
        )
    return "".join(f"{_hello(partition, vp_index).hex()}\n" for vp_index in range(vps))


def _hello(partition: CreatePartitionReply, vp_index: int) -> bytes:
    hello = HelloVp(partition_id=partition.partition_id, vp_index=vp_index, token=partition.token)
    return rpc.encode_request(1, hello.METHOD, [codec.to_fields(hello)])


@contextmanager
def _process(command: list[str | Path], ready: Path, pinned: bool) -> Iterator[None]:
    """A server that runs until the end of the block, and listens when it begins."""
    process = subprocess.Popen(_placed(command, pinned), stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 10
        while not ready.exists():
            if time.monotonic() > deadline or process.poll() is not None:
                raise click.ClickException(f"{command[0]} does not listen")
            time.sleep(0.01)
        time.sleep(0.1)  # an echo binds before it listens
        yield
    finally:
        process.terminate()
        process.wait()


def _placed(command: list[str | Path], pinned: bool) -> list[str]:
    return (["taskset", "-c", "0"] if pinned else []) + [str(word) for word in command]


def _measure(load: Path, subjects: list[Subject], rounds: int, pinned: bool) -> dict[str, Figures]:
    figures = {subject.name: Figures([], [], [], []) for subject in subjects}
    for _ in range(rounds):
        for subject in subjects:
            command: list[str | Path] = [
                load,
                subject.socket,
                str(subject.count),
                str(MAPPED_GFNS),
                subject.hellos,
            ]
            output = subprocess.run(
                _placed(command, pinned), check=True, capture_output=True, text=True
            ).stdout
            sample = json.loads(output)
            for name in ("rate", "p50", "p99", "fairness"):
                getattr(figures[subject.name], name).append(sample[name])
    return figures


def _show(title: str, figures: dict[str, Figures]) -> None:
    floor = figures["C echo"]
    table = Table(
        "", "median us", "x C echo", "p99 us", "answers/s", "fairness", title=title, title_justify="left"
    )
    for name, own in figures.items():
        table.add_row(
            name,
            f"{median(own.p50):.1f} ({min(own.p50):.1f} to {max(own.p50):.1f})",
            f"{median(ours / theirs for ours, theirs in zip(own.p50, floor.p50, strict=True)):.2f}",
            f"{median(own.p99):.0f}",
            f"{median(own.rate):,.0f}",
            f"{median(own.fairness):.2f}",
        )
    Console(width=100).print(table)


def _machine() -> dict[str, object]:
    return {"cpus": os.cpu_count(), "kernel": platform.release(), "python": platform.python_version()}


def _as_dict(figures: Figures) -> dict[str, list[float]]:
    return {name: getattr(figures, name) for name in ("rate", "p50", "p99", "fairness")}


if __name__ == "__main__":
    main()
