"""Standard output, and how a command ends that cannot write there.

Owns that such a command prints no traceback: one sentence, or none where the reader went away. Must not know
commands.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import click

from intercept_protocol.text import sentence

LOST: Final = 1
"""The exit code of a command whose output did not arrive."""


class OutputLost(Exception):
    """Standard output takes no more. Not an `OSError`: what handles the errors of sockets leaves it alone."""


class ReaderGone(OutputLost):
    """Standard output is a pipe or socket that was closed at its other end."""


@contextmanager
def guarded_stdout() -> Iterator[None]:
    """Turn a failed write to standard output into the end of the program.

    The block writes through `sys.stdout`, which is another object for as long as it lasts. After a failed
    write, what follows goes nowhere: the block may clean up, and the interpreter flushes at its exit.
    """
    stdout = sys.stdout
    if stdout is None:  # the caller closed it
        with open(os.devnull, "w") as sys.stdout:
            yield
        return
    sys.stdout = io.TextIOWrapper(
        io.BufferedWriter(_Stdout(stdout.fileno(), "w", closefd=False)),
        encoding=stdout.encoding,
        errors=stdout.errors,
        line_buffering=stdout.isatty(),
    )
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except OutputLost as lost:
        _end(lost)
    except BaseExceptionGroup as group:
        among = group.subgroup(OutputLost)
        if among is None:
            raise
        _end(_first(among))


class _Stdout(io.FileIO):
    """Raises `OutputLost` where a file raises `OSError`, and writes to /dev/null from then on."""

    def write(self, data: object, /) -> int:
        try:
            return super().write(data)  # type: ignore[arg-type]  # a buffer, whose type has no name before 3.12
        except OSError as error:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.fileno())
            os.close(nowhere)
            if isinstance(error, BrokenPipeError):
                raise ReaderGone from error
            raise OutputLost(f"standard output: {sentence(error)}") from error


def _first(group: BaseException) -> BaseException:
    while isinstance(group, BaseExceptionGroup):
        group = group.exceptions[0]
    return group


def _end(lost: BaseException) -> None:
    if not isinstance(lost, ReaderGone):
        click.echo(f"Error: {lost}", err=True)
    sys.exit(LOST)
