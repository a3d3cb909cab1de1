"""Spin: search every order of steps of a model, and retell the shortest one that breaks a promise.

Owns the tools' command lines and what they print. The search is breadth first: a trail is as short as can be.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

MEGABYTES = 3000
"""Beyond this the search gives up, which is an error and no verdict."""
SECONDS = 600.0
_COUNT = re.compile(r"(\d+) states, stored")
_DEPTH = re.compile(r"depth reached (\d+)")
_ERRORS = re.compile(r"errors: (\d+)")
_STEP = re.compile(r"STEP (\w+) (\d+) (\w+)((?: \w+ \d+)*)")
_BROKEN = re.compile(r"model\.pml:(\d+), Error: assertion violated")

needs_spin = pytest.mark.skipif(
    not (shutil.which("spin") and shutil.which("gcc")),
    reason="spin or gcc is missing: apt-get install spin gcc",
)


@dataclass(frozen=True)
class Found:
    """`states` is how many there are, or were seen until the error; `broken` the promise that it breaks."""

    states: int
    depth: int
    errors: int
    broken: str
    story: tuple[str, ...]

    def __str__(self) -> str:
        verdict = f"{self.states} states, depth {self.depth}, errors: {self.errors}"
        return "\n".join([verdict, *self.story, *([f"broken: {self.broken}"] if self.broken else [])])


def search(text: str, directory: Path, *, optimise: int = 2) -> Found:
    """Exhaustively; raises AssertionError if the search did not come to its end.

    `optimise` is gcc's: 0 pays for a small world.
    """
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "model.pml").write_text(text, encoding="utf-8")
    _run(directory, "spin", "-a", "model.pml")
    _run(
        directory,
        "gcc",
        f"-O{optimise}",
        "-w",
        "-DSAFETY",
        "-DBFS",
        f"-DMEMLIM={MEGABYTES}",
        "-o",
        "pan",
        "pan.c",
    )
    printed = _run(directory, "./pan")
    count, depth, errors = (pattern.search(printed) for pattern in (_COUNT, _DEPTH, _ERRORS))
    assert count, printed
    assert depth, printed
    assert errors, printed
    assert "Search not completed" not in printed or int(errors[1]), printed
    story, broken = _retold(directory) if int(errors[1]) else ((), "")
    return Found(int(count[1]), int(depth[1]), int(errors[1]), broken, story)


def _retold(directory: Path) -> tuple[tuple[str, ...], str]:
    """The trail, a line a step, numbered, and the promise that its last one breaks."""
    replay = _run(directory, "spin", "-t", "model.pml")
    lines = []
    for number, (actor, me, row, parameters) in enumerate(_STEP.findall(replay), start=1):
        who = f"{actor} {me}" if actor in {"vp", "source"} else actor
        lines.append(f"{number:3} {who:9} {row.replace('_', ' ')}{_pages(parameters)}")
    broken = _BROKEN.search(replay)
    assert broken, replay
    line = (directory / "model.pml").read_text(encoding="utf-8").splitlines()[int(broken[1]) - 1]
    return tuple(lines), line.partition("/* ")[2].removesuffix(" */")


def _pages(parameters: str) -> str:
    words = parameters.split()
    shown = [
        f" {name} {{{','.join(str(page) for page in range(8) if int(mask) >> page & 1)}}}"
        for name, mask in zip(words[::2], words[1::2], strict=True)
    ]
    return "".join(shown)


def _run(directory: Path, *command: str) -> str:
    done = subprocess.run(
        command, cwd=directory, capture_output=True, text=True, timeout=SECONDS, check=False
    )
    assert done.returncode in {0, 1}, done.stdout + done.stderr
    assert "syntax error" not in done.stdout, done.stdout
    return done.stdout
