"""Single keys from a terminal, while something else is waited for.

Owns the terminal's mode meanwhile; must not know what a key means.
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
"""What is read when the terminal is gone."""


@contextmanager
def single_keys() -> Iterator[None]:
    """Keys are read as they are pressed, unseen; Ctrl-C still interrupts. As it was before at the end.

    Nothing is changed where standard input is no terminal.
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
    """The next key, at most so long waited for; None if there was none. Where no key can come, a sleep."""
    if not sys.stdin.isatty():
        time.sleep(seconds)
        return None
    ready, _, _ = select.select([sys.stdin], [], [], seconds)
    return os.read(sys.stdin.fileno(), 1).decode("latin-1") if ready else None
