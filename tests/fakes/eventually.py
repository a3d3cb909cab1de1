"""Waiting for another process without guessing how long it takes.

Owns the one place where system tests pause: look, pause a moment, look again, until a deadline.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

PATIENCE: Final = 60.0
"""Seconds after which something that should happen counts as not happening: a guard against hanging,
far beyond what a busy machine takes."""
_FIRST_PAUSE, _LONGEST_PAUSE = 0.0002, 0.02


def eventually(look: Callable[[], object], expected: object, patience: float = PATIENCE) -> None:
    """Return once `look()` equals `expected`; AssertionError with what was seen last otherwise."""
    deadline = time.monotonic() + patience
    pause = _FIRST_PAUSE
    while (seen := look()) != expected:
        assert time.monotonic() < deadline, f"expected {expected!r} in time, last seen {seen!r}"
        time.sleep(pause)
        pause = min(2 * pause, _LONGEST_PAUSE)
