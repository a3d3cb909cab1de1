"""Reads single keys from a terminal.

Owns the terminal's mode while it does; must not know what a key means.
"""

from __future__ import annotations

import os
import select
import sys
import termios
import time
import tty
from collections.abc import Iterator
from contextlib import contextmanager

END = ""
"""What reading returns once the terminal is gone."""


@contextmanager
def single_keys() -> Iterator[None]:
    """Within the block, keys are read as they are pressed, without echo; Ctrl-C still interrupts.

    Does nothing if standard input is not a terminal.
    """
    if not sys.stdin.isatty():
        yield
        return
    before = termios.tcgetattr(sys.stdin)
    tty.setcbreak(sys.stdin)
    try:
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)


def key_within(seconds: float) -> str | None:
    """Wait at most `seconds` for a key; None if there was none. Sleeps if stdin is not a terminal."""
    if not sys.stdin.isatty():
        time.sleep(seconds)
        return None
    ready, _, _ = select.select([sys.stdin], [], [], seconds)
    return os.read(sys.stdin.fileno(), 1).decode("latin-1") if ready else None
