"""What a restored guest waits for: its page faults, served by the daemon and by a handler in C.

Owns these measurements and their tables; part of `make bench`, and can be run by itself with `tests` on the
PYTHONPATH. Faults and sweeps are those of a process that hands its memory over as Firecracker does
(`toucher.c`); restores are real Firecrackers'. The image is in the page cache unless it is said to be cold or
stuck.
"""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Final

from report import CONSOLE
from rich.table import Table
from running import Command, Load, Place, build, daemon_command, server

from fakes.fuse_image import Order, fuse_image, needs
from firecracker.asker import Asker
from firecracker.binary import why_not
from firecracker.content import PAGE
from firecracker.machine import MIB, Machine, Snapshot
from firecracker.restoring import FIRST, Span, all_memory, build_guest, save

ROUNDS: Final = 5
SINGLE_PAGES: Final = 4096
"""Of which each is a fault."""
SWEEP_PAGES: Final = 32768
AROUND: Final = 64
GUEST_MIB: Final = 128
GUESTS: Final = 8
APART: Final = 129
"""Pages: one of so many is in a guest's working set, so that each has a fault, and brings a block in."""
WORKING_SET: Final = Span(FIRST, (GUEST_MIB * MIB - FIRST) // PAGE // APART, APART * PAGE)
PREFETCH: Final = [
    (page - page % AROUND, AROUND)
    for page in range(FIRST // PAGE, FIRST // PAGE + WORKING_SET.words * APART, APART)
]
C, DAEMON, PREFETCHED = "in C", "interceptd", "interceptd, prefetched"


@dataclass(frozen=True, slots=True)
class Costs:
    """By place, and by who serves: a figure a round. Microseconds of a fault, MB/s of a sweep; seconds of
    restores; `beside`: p99 in microseconds, alone and while another's image is stuck."""

    faults: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    sweeps: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    quiet: dict[str, list[float]] = field(default_factory=dict)
    cold: dict[str, list[float]] = field(default_factory=dict)
    together: dict[str, list[float]] = field(default_factory=dict)
    beside: list[tuple[float, float]] = field(default_factory=list)


class InC:
    """The handler in C, a process for each image."""

    def __init__(self, binary: Path, place: Place) -> None:
        self._binary = binary
        self._place = place

    @contextmanager
    def serving(self, image: Path, socket: Path, around: int) -> Iterator[None]:
        with subprocess.Popen(
            [self._binary, socket, image, str(around)],
            stdout=subprocess.PIPE,
            preexec_fn=self._place.before_exec,  # noqa: PLW1509 - no threads here
        ) as process:
            assert process.stdout is not None
            if process.stdout.readline() != b"ready\n":
                raise RuntimeError("the handler in C does not listen")
            yield
            process.kill()


class ByDaemon:
    """A daemon that serves all."""

    def __init__(self, daemon: Path, prefetch: Sequence[tuple[int, int]] | None = None) -> None:
        self._daemon = daemon
        self._prefetch = prefetch

    @contextmanager
    def serving(self, image: Path, socket: Path, around: int) -> Iterator[None]:
        with Asker(self._daemon) as asker:
            asker.restore(image, socket, prefetch=self._prefetch, around_pages=around)
        yield


Server = InC | ByDaemon


def measure(scratch: Path, load: Load) -> Costs:
    """Nothing without a compiler; no restores without Firecracker; each time a line says why."""
    costs = Costs()
    if not load.in_c:
        CONSOLE.print("restores: left out: gcc is missing")
        return costs
    handler = build(scratch, "handler.c")
    with TemporaryDirectory(dir=scratch) as name, ExitStack() as running:
        directory = Path(name)
        toucher = Toucher(build(scratch, "toucher.c"), directory)
        few, many = directory / "few", directory / "many"
        _write_image(few, SINGLE_PAGES)
        _write_image(many, SWEEP_PAGES)
        daemons = {}
        for place in Place:
            daemons[place] = Path(running.enter_context(TemporaryDirectory(dir=directory)), "vmm.sock")
            running.enter_context(server(daemon_command(daemons[place]), daemons[place], place))
        for _ in range(ROUNDS):
            for place in Place:
                both: Mapping[str, Server] = {C: InC(handler, place), DAEMON: ByDaemon(daemons[place])}
                for who, serves in both.items():
                    fault, sweep = (
                        toucher.faults(serves, few, place)["p50"],
                        toucher.sweep(serves, many, place),
                    )
                    costs.faults.setdefault(place.value, {}).setdefault(who, []).append(fault)
                    costs.sweeps.setdefault(place.value, {}).setdefault(who, []).append(sweep)
        daemon = daemons[Place.ANY_CPU]
        costs.beside.extend(toucher.beside_a_stuck_one(daemon, few))
        _restores(costs, directory, InC(handler, Place.ANY_CPU), daemon)
    return costs


def show(costs: Costs) -> None:
    if costs.faults:
        table = Table("", "a fault, us", "x in C", "a sweep, MB/s", "x in C", title_justify="left")
        table.title = f"missing pages: one a fault, and a sweep with {AROUND} a fault: medians"
        for place, by_who in costs.faults.items():
            for who, faults in by_who.items():
                sweeps = costs.sweeps[place]
                table.add_row(
                    f"{who}, {place}",
                    f"{median(faults):.1f}",
                    f"{_ratio(faults, by_who[C]):.2f}",
                    f"{median(sweeps[who]):.0f}",
                    f"{_ratio(sweeps[who], sweeps[C]):.2f}",
                )
        CONSOLE.print(table)
    if costs.beside:
        alone, stuck = (median(column) for column in zip(*costs.beside, strict=True))
        ratio = median(later / first for first, later in costs.beside)
        told = f"p99 of a fault: {alone:.0f} us alone, {stuck:.0f} us while another's image is stuck"
        CONSOLE.print(f"{told}: {ratio:.2f} times")
    if costs.quiet:
        columns = ("one restore, ms", "the same, cold", f"{GUESTS} at once, all memory, ms", "MB/s")
        table = Table("", *columns, title_justify="left")
        table.title = f"Firecracker, {GUEST_MIB} MiB: from its load to the guest's answer: medians"
        for who, taken in costs.quiet.items():
            several = median(costs.together[who]) if who in costs.together else None
            table.add_row(
                who,
                f"{1e3 * median(taken):.0f}",
                f"{1e3 * median(costs.cold[who]):.0f}",
                f"{1e3 * several:.0f}" if several else "",
                f"{GUESTS * GUEST_MIB * MIB / several / 1e6:.0f}" if several else "",
            )
        CONSOLE.print(table)


def as_json(costs: Costs) -> dict[str, object]:
    return {
        "faults": costs.faults,
        "sweeps": costs.sweeps,
        "quiet": costs.quiet,
        "cold": costs.cold,
        "together": costs.together,
        "beside": costs.beside,
    }


# ------------------------------------------------ faults


def _write_image(image: Path, pages: int) -> None:
    """As `toucher.c` wants it."""
    with image.open("wb") as file:
        for page in range(pages):
            file.write(page.to_bytes(8, "little") + bytes(PAGE - 8))


@dataclass(frozen=True, slots=True)
class Toucher:
    """Processes that hand over as many pages as the image has, and touch them."""

    binary: Path
    directory: Path

    def faults(self, serves: Server, image: Path, place: Place) -> Mapping[str, float]:
        """Each page by itself: `p50` and `p99`, in microseconds."""
        return self._measured(serves, image, 1, "each", place)

    def sweep(self, serves: Server, image: Path, place: Place) -> float:
        """All pages in order: MB/s."""
        return self._measured(serves, image, AROUND, "all", place)["megabytes_per_second"]

    def _measured(
        self, serves: Server, image: Path, around: int, how: str, place: Place
    ) -> Mapping[str, float]:
        socket = self.directory / "touched"
        with serves.serving(image, socket, around):
            command: Command = [self.binary, socket, str(image.stat().st_size // PAGE), how]
            done = subprocess.run(command, check=True, capture_output=True, preexec_fn=place.before_exec)
        socket.unlink()
        measured: Mapping[str, float] = json.loads(done.stdout)
        return measured

    def beside_a_stuck_one(self, daemon: Path, image: Path) -> Iterator[tuple[float, float]]:
        """The p99 of a guest's faults, alone, and while another waits for its first page in vain."""
        if (reason := needs()) is not None:
            CONSOLE.print(f"beside a stuck image: left out: {reason}")
            return
        serves, socket = ByDaemon(daemon), self.directory / "stuck"
        for _ in range(ROUNDS):
            alone = self.faults(serves, image, Place.ANY_CPU)["p99"]
            with fuse_image(image) as stuck, Asker(daemon) as asker:
                stuck.reads(Order.HOLD)
                partition_id = asker.restore(stuck.file, socket)
                other = subprocess.Popen([self.binary, socket, str(SINGLE_PAGES), "each"])
                while asker.progress(partition_id).get("first_fault_ms") is None:
                    time.sleep(0.01)
                beside = self.faults(serves, image, Place.ANY_CPU)["p99"]
                if other.poll() is not None:
                    raise RuntimeError("the stuck guest went on")
                other.kill()
                other.wait()
            socket.unlink()
            yield alone, beside


# ------------------------------------------------ restores


def _restores(costs: Costs, directory: Path, in_c: InC, daemon: Path) -> None:
    if (reason := why_not()) is not None:
        CONSOLE.print(f"Firecracker's restores: left out: {reason}")
        return
    saved = save(build_guest(directory), directory, GUEST_MIB)
    servers: Mapping[str, Server] = {
        C: in_c,
        DAEMON: ByDaemon(daemon),
        PREFETCHED: ByDaemon(daemon, PREFETCH),
    }
    for _ in range(ROUNDS):
        for who, serves in servers.items():
            taken = _restored(directory, serves, saved, 1, WORKING_SET)
            costs.quiet.setdefault(who, []).append(taken)
            _drop_from_page_cache(saved.memory)
            taken = _restored(directory, serves, saved, 1, WORKING_SET)
            costs.cold.setdefault(who, []).append(taken)
            if who != PREFETCHED:
                together = _restored(directory, serves, saved, GUESTS, *all_memory(GUEST_MIB))
                costs.together.setdefault(who, []).append(together)


def _restored(directory: Path, serves: Server, saved: Snapshot, count: int, *spans: Span) -> float:
    """Seconds until the last of so many guests has looked at its memory. Their Firecrackers run already."""
    with ExitStack() as running, ThreadPoolExecutor(count) as threads:
        guests: list[tuple[Machine, Path]] = []
        for index in range(count):
            place = Path(running.enter_context(TemporaryDirectory(dir=directory, prefix=f"{index}-")))
            machine = running.enter_context(Machine(place))
            machine.wait_started()
            running.enter_context(serves.serving(saved.memory, place / "memory", AROUND))
            guests.append((machine, place / "memory"))
        began = time.perf_counter()

        def restore(machine: Machine, memory: Path) -> list[int]:
            machine.restore(saved.state, memory)
            return [machine.ask("hash", *span) for span in spans]

        found = [threads.submit(restore, *guest) for guest in guests]
        hashes = [each.result() for each in found]
        taken = time.perf_counter() - began
    if any(each != hashes[0] for each in hashes):
        raise RuntimeError("guests of one image differ")
    return taken


def _drop_from_page_cache(file: Path) -> None:
    descriptor = os.open(file, os.O_RDONLY)
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


def _ratio(own: Sequence[float], other: Sequence[float]) -> float:
    return median(one / two for one, two in zip(own, other, strict=True))


if __name__ == "__main__":
    with TemporaryDirectory(prefix="interceptd-restore-") as scratch_directory:
        show(measure(Path(scratch_directory), Load(Path(scratch_directory))))
