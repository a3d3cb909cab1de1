"""Ctrl-C and SIGTERM for commands that have something to write before they end.

Owns the signals' handlers. Must not know what is written.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def interrupts(interrupt: Callable[[], None]) -> Iterator[None]:
    """In the block, have Ctrl-C and SIGTERM call `interrupt` and do nothing else."""

    def called(_signal: int, _frame: FrameType | None) -> None:
        interrupt()

    before = {each: signal.signal(each, called) for each in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
