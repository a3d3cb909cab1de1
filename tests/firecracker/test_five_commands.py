"""`deploy/FIRECRACKER.md`, command by command, in a directory that has a snapshot and nothing else."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from fakes.documents import commands
from fakes.eventually import PATIENCE, eventually
from firecracker.binary import BINARY
from firecracker.content import Content
from firecracker.machine import MIB, Snapshot
from firecracker.restoring import FIRST, pages

DOCUMENT: Final = "deploy/FIRECRACKER.md"
INSTALL: Final = "pip install ."
"""What `make setup` has done."""
READY: Final = {
    "interceptd": "operator.sock",
    "interceptctl": "memory.sock",
    "firecracker": "firecracker.sock",
}
"""What a reader sees of a program before the next command."""
SEEN: Final = pages(4 * MIB, 6 * MIB)


class Shell:
    """In a directory, with our commands and Firecracker. `close` ends what goes on in the background."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.jobs: dict[str, subprocess.Popen[str]] = {}
        """By program: the last one."""
        programs = directory / "bin"
        programs.mkdir()
        (programs / "firecracker").symlink_to(BINARY)
        self._path = f"{programs}:{Path(sys.executable).parent}:{os.environ['PATH']}"
        self._started: list[subprocess.Popen[str]] = []

    def run(self, command: str) -> str:
        """What it prints; nothing of a job in the background, which has begun its work when this returns."""
        program, _, _ = command.partition(" ")
        job = subprocess.Popen(
            ["bash", "-c", f"exec {command.removesuffix('&')}"],
            cwd=self.directory,
            env=os.environ | {"PATH": self._path},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._started.append(job)
        if not command.endswith("&"):
            printed, _ = job.communicate(timeout=PATIENCE)
            assert job.returncode == 0, command
            return printed
        self.jobs[program] = job
        ready = self.directory / READY[program]
        eventually(lambda: job.poll() is not None or ready.exists(), True)
        assert job.poll() is None, command
        return ""

    def close(self) -> None:
        for job in reversed(self._started):
            if job.poll() is None:
                job.send_signal(signal.SIGTERM)
            job.communicate(timeout=PATIENCE)

    # ------------------------------------------------ the guest

    def guest_sees(self) -> int:
        """It touches the pages of `SEEN`."""
        machine = self.jobs["firecracker"]
        assert machine.stdin is not None
        assert machine.stdout is not None
        machine.stdin.write(" ".join(["hash", *(f"{number:x}" for number in SEEN)]) + "\n")
        machine.stdin.flush()
        answer = next(line for line in machine.stdout if line.startswith("= "))
        return int(answer.split()[1], 16)

    def end_guest(self) -> None:
        machine = self.jobs["firecracker"]
        machine.kill()
        machine.wait(PATIENCE)
        (self.directory / READY["firecracker"]).unlink()


@pytest.fixture
def shell(saved: Snapshot, tmp_path: Path) -> Iterator[Shell]:
    shutil.copy(saved.state, tmp_path / "vm.state")
    os.link(saved.memory, tmp_path / "vm.mem")
    shell = Shell(tmp_path)
    yield shell
    shell.close()


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is missing")
def test_five_commands_restore_a_vm_and_the_next_start_has_its_pages(shell: Shell) -> None:
    install, *others = (command for _, command in commands(DOCUMENT, "Five commands"))
    assert (install, len(others)) == (INSTALL, 4)
    assert SEEN.address >= FIRST
    with Content(shell.directory / "vm.mem") as content:
        expected = content.hash(*SEEN)
    assert [shell.run(command) for command in others] == [""] * 4, "curl prints what Firecracker refuses"
    assert shell.guest_sees() == expected
    shell.end_guest()
    told, _ = shell.jobs["interceptctl"].communicate(timeout=PATIENCE)
    assert told.startswith("the VM ended\n")
    assert " KiB on demand, " in told
    assert "\nvm.pages: " in told

    [(_, again)] = commands(DOCUMENT, "The next start")
    assert "waiting for a VMM at memory.sock" in shell.run(again)
    _, _, firecracker, load = others
    shell.run(firecracker)
    assert shell.run(load) == ""
    assert shell.guest_sees() == expected
    shell.end_guest()
