"""Guests that a daemon restores in real Firecrackers, and what each must find in its memory.

Owns the guest's kernel and its snapshots, and keeps a restored guest and what it must find in step. Must not
import the daemon.
"""

from __future__ import annotations

import subprocess
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final, NamedTuple, Self

from fakes.eventually import PATIENCE
from firecracker.asker import Asker
from firecracker.content import GAP, GAP_END, KEY, PAGE, Content
from firecracker.machine import MIB, Machine, Snapshot

HERE: Final = Path(__file__).parent
BALLOON: Final = 0xD000_0000
"""Where Firecracker maps its first device."""
SOCKET: Final = "memory.sock"
"""Where Firecracker hands its memory over, in a directory of its own."""
FIRST: Final = 2 * MIB
"""Below are the guest's own pages, which it also writes while it looks at others."""
GIVEN: Final = range(24 * MIB // PAGE, 25 * MIB // PAGE)
"""Pages that are in the balloon when the snapshot is taken."""
SAVED_MIB: Final = 128
"""Memory of the guest that most tests restore."""
FLAGS: Final = (
    "-std=gnu11", "-O1", "-Wall", "-Wextra", "-Werror", "-ffreestanding", "-nostdlib", "-static", "-no-pie",
    "-fno-pic", "-mgeneral-regs-only", "-mno-red-zone", "-fno-stack-protector", "-fcf-protection=none",
    f"-Wl,-T,{HERE / 'guest.ld'}", "-Wl,-z,max-page-size=4096", "-Wl,--build-id=none",
    "-Wl,--no-warn-rwx-segments",
)  # fmt: skip


def build_guest(directory: Path) -> Path:
    """The kernel that Firecracker boots."""
    kernel = directory / "guest.elf"
    subprocess.run(["gcc", *FLAGS, "-o", kernel, HERE / "guest.c"], check=True, timeout=PATIENCE)
    return kernel


class Span(NamedTuple):
    """`words` of a guest's memory, `stride` bytes apart."""

    address: int
    words: int
    stride: int = PAGE


def pages(first: int, end: int) -> Span:
    """The first word of every page between two guest-physical addresses."""
    return Span(first, (end - first) // PAGE)


def all_memory(mib: int) -> list[Span]:
    """Every page that only tests write."""
    size = mib * MIB
    spans = [pages(FIRST, min(size, GAP))]
    return spans if size <= GAP else [*spans, pages(GAP_END, GAP_END + size - GAP)]


def save(kernel: Path, directory: Path, mib: int, *, huge: bool = False, apart: int = 1) -> Snapshot:
    """Boot a guest, fill its memory, give some of it to the balloon, and take a snapshot. With pages of 2 MiB
    there is no balloon. Of `apart` pages one is filled."""
    saved = Snapshot(directory / "state", directory / "memory")
    with Machine(directory / "saved") as machine:
        machine.boot(kernel, mib, huge=huge, balloon=not huge)
        for span in all_memory(mib):
            for address in (span.address, span.address + PAGE - 8):
                machine.ask("fill", address, span.words // apart, span.stride * apart, KEY)
        if not huge:
            machine.ask("balloon", BALLOON)
            machine.ask("inflate", GIVEN.start, len(GIVEN))
        machine.snapshot(saved)
    return saved


@dataclass(frozen=True, slots=True)
class Guest:
    """A restored guest beside what its memory must hold."""

    machine: Machine
    content: Content
    partition_id: int

    def looks(self, *spans: Span) -> list[int]:
        """What the guest finds: it touches every page of them."""
        return [self.machine.ask("hash", *span) for span in spans]

    def must_find(self, *spans: Span) -> list[int]:
        return [self.content.hash(*span) for span in spans]

    def inflate(self, page: int, count: int) -> None:
        self.content.remove(page, count)
        self.machine.ask("inflate", page, count)

    def write(self, address: int, word: int) -> None:
        self.content.write(address, word)
        self.machine.ask("write", address, word)


class Restores:
    """Guests of one daemon, each in a directory of its own; all end with the block."""

    def __init__(self, daemon: Path, directory: Path) -> None:
        self.daemon = daemon
        self._directory = directory
        self._held = ExitStack()
        self._count = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._held.close()

    def start(self, saved: Snapshot, image: Path | int | None = None, **options: Any) -> Guest:
        """Restore a snapshot by the daemon, whose asker leaves before Firecracker begins. The options are
        those of `Asker.restore`."""
        directory = self.new_directory()
        with Asker(self.daemon) as asker:
            partition_id = asker.restore(image or saved.memory, directory / SOCKET, **options)
        return self.begin(saved, directory, partition_id)

    def new_directory(self) -> Path:
        self._count += 1
        directory = self._directory / f"guest{self._count}"
        directory.mkdir(parents=True)
        return directory

    def begin(self, saved: Snapshot, directory: Path, partition_id: int) -> Guest:
        """Start Firecracker, whose memory somebody serves at `SOCKET` in that directory."""
        machine = self._held.enter_context(Machine(directory))
        machine.restore(saved.state, directory / SOCKET)
        return Guest(machine, self._held.enter_context(Content(saved.memory)), partition_id)

    def progress(self, guest: Guest) -> Any:
        """As any process of this user may ask."""
        with Asker(self.daemon) as asker:
            return asker.progress(guest.partition_id)
