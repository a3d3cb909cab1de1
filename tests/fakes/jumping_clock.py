"""A daemon whose wall clock is set back and forth by a year: `python -m fakes.jumping_clock serve ...`.

It jumps at each reading: into the past, into the future, and back.
"""

from __future__ import annotations

import itertools
import runpy
import sys
import time
from typing import Final

YEAR_NS: Final = 365 * 86_400 * 10**9
LAUNCH: Final = (sys.executable, "-m", "fakes.jumping_clock")


def jump() -> None:
    """Make the wall clock of this process jump."""
    read, offsets = time.time_ns, itertools.cycle([-YEAR_NS, YEAR_NS, 0])

    def time_ns() -> int:
        return read() + next(offsets)

    time.time_ns, time.time = time_ns, lambda: time_ns() / 1e9


if __name__ == "__main__":
    jump()
    runpy.run_module("interceptd", run_name="__main__", alter_sys=True)
