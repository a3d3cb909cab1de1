"""A barrier between processes: one side announces itself and stops there, the other releases it.

Owns two named pipes in a directory. They are opened for both directions, which on Linux never blocks.
"""

from __future__ import annotations

import os
import select
from pathlib import Path
from typing import Final

from fakes.eventually import PATIENCE

_ARRIVED, _PASS = "arrived", "pass"
_BYTE: Final = b"."


class Barrier:
    """Both sides make one; the first that does creates the pipes."""

    def __init__(self, directory: Path) -> None:
        for name in (_ARRIVED, _PASS):
            path = directory / name
            if not path.exists():
                os.mkfifo(path)
        self.arrivals = os.open(directory / _ARRIVED, os.O_RDWR)
        self.passes = os.open(directory / _PASS, os.O_RDWR)

    def arrive(self) -> None:
        """Announce an arrival. Does not wait."""
        os.write(self.arrivals, _BYTE)

    def pass_through(self) -> None:
        """Wait for the other side to release one."""
        os.read(self.passes, 1)

    def wait_arrived(self) -> None:
        """Wait for an arrival, or raise AssertionError."""
        assert select.select([self.arrivals], [], [], PATIENCE)[0], "no arrival at the barrier in time"
        os.read(self.arrivals, 1)

    def let_go(self, count: int = 1) -> None:
        """Let `count` go, now or when they come."""
        os.write(self.passes, _BYTE * count)
