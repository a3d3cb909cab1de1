"""Holding up daemons at the moment before they bind.

Owns the lock on a directory that whoever binds a socket there takes (flock(2)), and seeing who waits for one.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Nobody binds a socket in the directory within."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def is_waiting_for_a_lock(pid: int) -> bool:
    """Whether a process is blocked by somebody's lock: `->` in /proc/locks."""
    lines = Path("/proc/locks").read_text().splitlines()
    return any("->" in line and str(pid) in line.split() for line in lines)
