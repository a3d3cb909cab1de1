"""A tenant that costs the others time, in a process of its own and of another uid.

Owns the process, and what the attacks have in common. An attack is a generator of three parts: it prepares,
it does what its figures are compared with, and it attacks; then it waits at a `yield`, or its process ends
with everything that it has. Must not know who is served meanwhile.
"""

from __future__ import annotations

import os
import resource
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from fakes.good_vp import FORK
from fakes.other_user import become
from fakes.raw_client import RawConnection

Attack = Callable[[Path], Iterator[None]]
PATIENCE: Final = 120.0
FILES: Final = 20_000
"""Descriptors that a hostile process may have open."""
SECONDS: Final = 2.0
"""How long each part lasts that does not end by itself."""


class HostileTenant:
    """A child process of the user `uid` that carries out an attack, part by part."""

    def __init__(self, attack: Attack, path: Path, uid: int) -> None:
        self._control, theirs = FORK.Pipe()
        self._process = FORK.Process(target=_carry_out, args=(attack, path, uid, theirs))
        self._process.start()
        theirs.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.join()
        self._control.close()

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


def _carry_out(attack: Attack, path: Path, uid: int, control: Connection) -> None:
    RawConnection.patience = PATIENCE
    resource.setrlimit(resource.RLIMIT_NOFILE, (FILES, FILES))
    become(uid, uid)
    try:
        control.recv()
        for _ in attack(path):
            control.send(None)
            control.recv()
    except BaseException:  # whatever it is, the parent sees the exit status
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def for_a_while(seconds: float = SECONDS) -> Iterator[None]:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        yield


def rest() -> None:
    """Be there, and do nothing."""
    threading.Event().wait(SECONDS)
