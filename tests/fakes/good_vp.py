"""A well-behaved VP in a process of its own, which asks every millisecond and measures how long it waits.

Owns the VP, its partition and the figures. Must not know what goes on beside it.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

from fakes.eventually import PATIENCE
from fakes.raw_client import RawConnection
from fakes.raw_vmm import RawVmm

PAUSE = 0.001
"""Seconds between an answer and the next intercept."""
NICE = -10
"""Of this VP, and of the daemon that serves it: what is measured is the daemon's fairness, not that of the
kernel's scheduler."""
FORK = multiprocessing.get_context("fork")


class Waits(NamedTuple):
    """Milliseconds that its intercepts took, and how many there were."""

    p50: float
    p99: float
    longest: float
    asked: int

    @classmethod
    def of(cls, seconds: list[float]) -> Waits:
        ordered = sorted(1000 * each for each in seconds)
        return cls(ordered[len(ordered) // 2], ordered[len(ordered) * 99 // 100], ordered[-1], len(ordered))

    def __str__(self) -> str:
        return f"p50 {self.p50:.2f}, p99 {self.p99:.2f}, longest {self.longest:.1f} ms, {self.asked} times"


class GoodVp:
    """Of the tests' own user, who must be root."""

    def __init__(self, path: Path) -> None:
        self._control, theirs = FORK.Pipe()
        self._process = FORK.Process(target=_ask_and_measure, args=(path, theirs), daemon=True)
        self._process.start()
        theirs.close()
        self._control.recv()

    def close(self) -> None:
        self._process.kill()
        self._process.join(PATIENCE)

    @contextmanager
    def measured(self) -> Iterator[list[Waits]]:
        """The list has the figures of the context once that has ended."""
        figures = list[Waits]()
        self._take()
        yield figures
        figures.append(Waits.of(self._take()))

    def _take(self) -> list[float]:
        """What it measured since the last time; EOFError if it was not served."""
        self._control.send(None)
        taken: list[float] = self._control.recv()
        return taken


def _ask_and_measure(path: Path, control: Connection) -> None:
    RawConnection.patience = PATIENCE
    os.setpriority(os.PRIO_PROCESS, 0, NICE)
    with RawVmm(path) as vmm:
        vp = vmm.vp()
        control.send(None)
        taken = list[float]()
        while True:
            began = time.perf_counter()
            vp.intercept(0)
            taken.append(time.perf_counter() - began)
            if control.poll(PAUSE):
                control.recv()
                control.send(taken)
                taken = []
