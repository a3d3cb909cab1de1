"""A command whose output cannot be written ends without a traceback."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import pytest

from fakes.daemon_process import DaemonProcess
from fakes.eventually import PATIENCE

COMMANDS: Final = (
    ["--help"],
    ["ls"],
    ["stats", "--json"],
    ["doctor", "--for", "model"],
    ["top", "--once", "--interval", "0.1"],
    ["guest", "--list"],
)
"""One for each way to standard output, of those that end by themselves."""
QUICK: Final = (["--help"], ["ls"])


@pytest.fixture(scope="module")
def operators(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A daemon's operator socket."""
    with DaemonProcess(tmp_path_factory.mktemp("daemon")) as daemon:
        yield daemon.wait_serving().operator_socket


def command(*arguments: str | Path) -> list[str | Path]:
    return [sys.executable, "-m", "interceptctl", *arguments]


@contextmanager
def closed_pipe() -> Iterator[int]:
    reader, writer = os.pipe()
    os.close(reader)
    yield writer
    os.close(writer)


@contextmanager
def full_device() -> Iterator[int]:
    descriptor = os.open("/dev/full", os.O_WRONLY)
    yield descriptor
    os.close(descriptor)


def run(operators: Path, arguments: Sequence[str], stdout: int) -> tuple[int, str]:
    """The exit status of a command, and its complaint."""
    ended = subprocess.run(
        command("--socket", operators, *arguments),
        stdin=subprocess.DEVNULL,
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    return ended.returncode, ended.stderr


@pytest.mark.parametrize("arguments", COMMANDS, ids=" ".join)
def test_a_command_whose_output_finds_no_space_says_so_in_one_sentence(
    operators: Path, arguments: list[str]
) -> None:
    with full_device() as stdout:
        assert run(operators, arguments, stdout) == (
            1,
            "Error: standard output: No space left on device\n",
        )


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param(each, marks=[] if each in QUICK else [pytest.mark.verify], id=" ".join(each))
        for each in COMMANDS
    ],
)
def test_a_command_whose_reader_is_gone_ends_without_a_word(operators: Path, arguments: list[str]) -> None:
    with closed_pipe() as stdout:
        assert run(operators, arguments, stdout) == (1, "")


@pytest.mark.verify
def test_an_exercise_whose_reader_goes_away_ends_without_a_word() -> None:
    """Its tasks and its daemon end with it."""
    arguments = ("exercise", "--vps", "1", "--memory", "declared", "--seconds", "600")
    with subprocess.Popen(command(*arguments), stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(PATIENCE) == 1


def test_a_command_without_standard_output_has_a_verdict_of_its_own(operators: Path) -> None:
    """`top` without --once wants to know whether it is a terminal."""
    ended = subprocess.run(
        ["sh", "-c", 'exec "$@" >&-', "sh", *command("--socket", operators, "top")],
        stderr=subprocess.PIPE,
        timeout=PATIENCE,
        check=False,
    )
    assert (ended.returncode, b"Traceback" in ended.stderr) == (2, False)
