"""The README's commands, run in one shell from start to end.

Three things differ: the sockets are in a temporary directory; the daemon runs in the background instead of a
second terminal; and `DONE_BY` does what a reader does with eyes and keys.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import pytest

from fakes.shell import INTERRUPT, Shell

ROOT: Final = Path(__file__).parents[2]
README: Final = (ROOT / "README.md").read_text(encoding="utf-8")
DIRECTORY: Final = "/tmp/interceptd"
LONGEST: Final = 300.0
"""Seconds that `make run` may take at most, which exercises for 12 and then runs guests."""
BLOCK: Final = re.compile(r"^```(console|python)\n(.*?)^```", re.DOTALL | re.MULTILINE)
LACKING: Final = [tool for tool in ("bash", "setsid", "curl", "make") if shutil.which(tool) is None]
pytestmark = pytest.mark.skipif(bool(LACKING), reason=f"needs {', '.join(LACKING)}")

Step = tuple[str, str]
"""A command and what the README shows of it, or a Python program and what it says that this prints."""


def steps() -> Iterator[Step]:
    for kind, block in BLOCK.findall(README):
        if kind == "python":
            [said] = re.findall(r"print\(.*\)  # (.*)$", block, flags=re.MULTILINE)
            yield f"python - <<'end'\n{block}end", said
        else:
            yield from re.findall(r"^\$ (.*)\n((?:(?!\$ ).*\n)*)", block, flags=re.MULTILINE)


def list_until_there_is_one(shell: Shell, command: str) -> int:
    """Repeat until the exercise, which was just started, has its partition."""
    status, shown = shell.run(command)
    while status == 0 and "exercise" not in shown:
        status, shown = shell.run(command)
    return status


def look_and_press_q(shell: Shell, command: str) -> int:
    shell.start(command)
    shell.wait_shown("TREND")
    shell.type("q")
    return shell.ended()[0]


def look_and_interrupt(shell: Shell, command: str) -> int:
    shell.start(command)
    shell.wait_shown(r"\d\d:\d\d:\d\d\.\d{3} +\d+ (region|range|invalidation)_")
    shell.type(INTERRUPT)
    return shell.ended()[0]


def find_nothing_or_something_missing(shell: Shell, command: str) -> int:
    """0 or 1 by what the machine has."""
    status, shown = shell.run(command)
    return 0 if (status, "missing" in shown) == (1, True) else status


DONE_BY: Final[dict[str, Callable[[Shell, str], int]]] = {
    "interceptctl doctor": find_nothing_or_something_missing,
    "interceptctl ls": list_until_there_is_one,
    "interceptctl top": look_and_press_q,
    "interceptctl watch": look_and_interrupt,
}


def do(shell: Shell, command: str) -> tuple[int, str]:
    """One step; its exit status, and what it showed where that is compared."""
    if command.startswith("interceptd serve"):
        shell.start_beside(f"{command} &")
        shell.wait_shown("daemon_started")
        return 0, ""
    if command.partition(" #")[0].rstrip().endswith("&"):
        shell.start_beside(command)
        return 0, ""
    for beginning, by in DONE_BY.items():
        if command.startswith(beginning):
            return by(shell, command), ""
    return shell.run(command)


@pytest.mark.parametrize(
    "skipped", ["make run", pytest.param("nothing", marks=pytest.mark.verify)], ids="without {}".format
)
def test_the_readme_works_word_by_word_in_one_shell(tmp_path: Path, skipped: str) -> None:
    assert README.count(DIRECTORY) > 5
    with Shell(ROOT, os.environ, LONGEST) as shell:
        for command, said in steps():
            if command == skipped:
                continue
            status, shown = do(shell, command.replace(DIRECTORY, str(tmp_path)))
            assert (command, status, shown[-2000:] if status else "") == (command, 0, "")
            if command.startswith(("python", "make run")):
                assert said.splitlines()[-1] in shown
        daemon, exercise = shell.background
        assert shell.run(f"wait {exercise}")[0] == 3, "its daemon has ended"
        assert shell.run(f"wait {daemon}")[0] == 0
    assert list(tmp_path.iterdir()) == []
