"""What a restore shows: a bar or lines while it goes on, and a summary at its end.

Owns the words and the terminal. Must not know when the daemon is asked.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from intercept_protocol.messages import RestoreState, RestoreStatistics
from intercept_protocol.text import visible
from interceptctl import restored, units


class Shown:
    """Progress, on standard error: a bar on a terminal, else a line for each change of state."""

    def __init__(self, partition_id: int, listen: Path) -> None:
        self._partition = f"partition {partition_id}"
        self._listen = listen
        self._said = ""
        self._bar: Progress | None = None
        if sys.stderr.isatty():
            console = Console(stderr=True, highlight=False, emoji=False, markup=False)
            columns = (
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                TextColumn("{task.fields[done]}"),
            )
            self._bar = Progress(*columns, console=console, auto_refresh=False, transient=True)
            self._task = self._bar.add_task("", total=None, done="")

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def show(self, now: RestoreStatistics) -> None:
        said = f"{self._partition}: {state(now, self._listen)}"
        if self._bar is not None:
            waiting = now.state == RestoreState.WAITING
            self._bar.update(
                self._task,
                description=said,
                total=None if waiting else now.image_pages,
                completed=now.pages_in,
                done="" if waiting else _done(now),
                refresh=True,
            )
        else:
            self.say(said)

    def say(self, sentence: str) -> None:
        """A line of its own, if it says something new."""
        if sentence == self._said:
            return
        self._said = sentence
        if self._bar is not None:
            self._bar.console.print(sentence)
        else:
            click.echo(sentence, err=True)


def state(now: RestoreStatistics, listen: Path) -> str:
    """Also where a VMM is waited for."""
    if now.state == RestoreState.WAITING:
        error = f"; {visible(now.error)}" if now.error else ""
        return f"waiting for a VMM at {visible(str(listen))}{error}"
    return restored.state(now)


def end(last: RestoreStatistics | None, listen: Path, *, interrupted: bool, away: bool) -> Iterator[str]:
    """What the restore came to, as far as the daemon said."""
    if away:
        yield "no daemon is there: the guest waits at the first page that is missing until one goes on"
    elif interrupted:
        yield "interrupted; the daemon goes on with it"
    if last is None:
        return
    if not (last.state == RestoreState.ENDED and last.error):
        yield state(last, listen)
    if restored.brought_in(last):
        yield from restored.figures(last)


def failure(last: RestoreStatistics, listen: Path) -> Iterator[str]:
    """Why it ended, and what to do."""
    yield f"the restore ended: {last.error}"
    if not last.pid and not restored.brought_in(last):
        yield f"have the VMM load its snapshot with {listen} as backend_path; --wait gives it more time"


def _done(now: RestoreStatistics) -> str:
    pages = f"{units.pages(now.pages_in)} of {units.pages(now.image_pages)}"
    return f"{pages}, {units.of(now.faults, 'fault')}"
