"""A tenant that costs the others time, in a process of its own and, as a rule, of another uid.

Owns the process, and what the attacks have in common. An attack is a generator of three parts: it prepares,
it does what its figures are compared with, and it attacks; then it waits at a `yield`, or its process ends
with everything that it has. Its `Size` says how much of the limits it uses. Must not know who is served
meanwhile.
"""

from __future__ import annotations

import itertools
import os
import resource
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Final, NamedTuple, Self

from fakes.good_vp import FORK
from fakes.other_user import become
from fakes.raw_client import RawConnection

PATIENCE: Final = 120.0
FILES: Final = 20_000
"""Descriptors that a hostile process may have open."""


class Size(NamedTuple):
    """How much an attack does."""

    part: float
    """Of what the limits allow."""
    seconds: float
    """How long a thing is done again and again, or nothing is done."""
    times: int
    """How often it is done, at least."""

    def of(self, most: int, least: int = 1) -> int:
        """How many there are of what there may be `most`."""
        return max(least, int(self.part * most))

    def again_and_again(self) -> Iterator[None]:
        end = time.monotonic() + self.seconds
        for done in itertools.count():
            if done >= self.times and time.monotonic() >= end:
                return
            yield

    def rest(self) -> None:
        """Be there, and do nothing."""
        threading.Event().wait(self.seconds)


FULL: Final = Size(part=1, seconds=2.0, times=1)
QUICK: Final = Size(part=1 / 32, seconds=0, times=3)
"""For a daemon whose work is counted: its verdict needs no more."""
Attack = Callable[[Path, Size], Iterator[None]]


class HostileTenant:
    """A child process of the user `uid`, or of the tests' own, that carries out an attack, part by part."""

    def __init__(self, attack: Attack, path: Path, uid: int | None, size: Size = FULL) -> None:
        self._control, theirs = FORK.Pipe()
        self._process = FORK.Process(target=_carry_out, args=(attack, path, uid, size, theirs))
        self._process.start()
        theirs.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()
        self._control.close()

    def kill(self) -> None:
        self._process.kill()
        self._process.join()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None, "it was started"
        return self._process.pid

    def go_on(self) -> bool:
        """Block while it does its next part. Returns whether its process still is there."""
        self._control.send(None)
        assert self._control.poll(PATIENCE), "it is not done in time"
        try:
            self._control.recv()
        except EOFError:
            self._process.join(PATIENCE)
            assert self._process.exitcode == 0, "it has failed, as it says above"
            return False
        return True


def _carry_out(attack: Attack, path: Path, uid: int | None, size: Size, control: Connection) -> None:
    RawConnection.patience = PATIENCE
    if uid is not None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (FILES, FILES))
        become(uid, uid)
    try:
        control.recv()
        for _ in attack(path, size):
            control.send(None)
            control.recv()
    except BaseException:  # whatever it is, the parent sees the exit status
        traceback.print_exc()
        os._exit(1)
    os._exit(0)
