"""Programs in C that use the C client: built with all warnings as errors and with the sanitizers, and run.

Owns the compiler's command, and the conversation with a program that takes a line and prints a line. Must not
know what the lines mean.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import pytest

from fakes.eventually import PATIENCE

ROOT: Final = Path(__file__).parents[2]
HEADERS: Final = ROOT / "clients" / "c"
STRICT: Final = (
    "-std=c11", "-pedantic", "-Wall", "-Wextra", "-Werror", "-g", "-D_DEFAULT_SOURCE",
    "-fsanitize=address,undefined", "-fno-sanitize-recover=all", f"-I{HEADERS}", "-pthread",
)  # fmt: skip


def build(directory: Path, *sources: Path) -> Path:
    """Build a program of the first source's name in `directory`; skips the test where gcc is missing."""
    gcc = shutil.which("gcc")
    if gcc is None:
        pytest.skip("gcc is missing: the C client cannot be built")
    program = directory / sources[0].stem
    subprocess.run([gcc, *STRICT, "-o", program, *sources], check=True, timeout=PATIENCE)
    return program


class CPrograms:
    """Those of the tests and the example, each built when it is asked for first."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def __truediv__(self, name: str) -> Path:
        program = self._directory / name
        if not program.exists():
            folder = HEADERS if name == "example" else ROOT / "tests" / "clients"
            build(self._directory, folder / f"{name}.c")
        return program


def run(program: Path, *arguments: object, given: bytes = b"") -> list[str]:
    """What it prints, a line an element; it must succeed and break no rule that a sanitizer knows."""
    done = subprocess.run(
        [program, *map(str, arguments)], input=given, capture_output=True, timeout=PATIENCE, check=False
    )
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout.decode(errors="replace").splitlines()


class Conversation:
    """With a program that answers each line of its stdin by a line."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def do(self, *words: object) -> str:
        self.begin(*words)
        return self.end()

    def begin(self, *words: object) -> None:
        """Say it without waiting for the answer; `end` returns that."""
        assert self._process.stdin is not None
        self._process.stdin.write(" ".join(map(str, words)) + "\n")
        self._process.stdin.flush()

    def end(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().rstrip("\n")


@contextmanager
def conversation(program: Path, *arguments: object) -> Iterator[Conversation]:
    """Ends the program's stdin with the block; then it must succeed as in `run`."""
    command: list[str | Path] = [program, *map(str, arguments)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True) as process:
        try:
            yield Conversation(process)
            _, said = process.communicate(timeout=PATIENCE)
            assert process.returncode == 0, said
        finally:
            process.kill()
