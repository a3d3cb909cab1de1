"""Holding up daemons at the moment before they bind.

Owns the lock that binding a socket in a directory takes (flock(2)), and seeing which process waits for it.
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


def is_waiting_for_a_lock(pid: int, directory: Path) -> bool:
    """Whether a daemon has opened `directory`, which it does for the lock and until it has bound.

    Just this one: an interpreter that starts opens others, to see which modules lie in them.
    """
    try:
        return any(opened.resolve() == directory.resolve() for opened in Path(f"/proc/{pid}/fd").iterdir())
    except FileNotFoundError:  # a descriptor was closed after it was listed: ask again
        return False
