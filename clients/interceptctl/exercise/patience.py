"""How long the exercise waits for an answer before it counts the request as lost.

Owns the bound: far beyond what a daemon takes, also one that is started again.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import trio

PATIENCE: Final = 60.0
"""Seconds."""


class Unanswered(Exception):
    """A request was lost, or a page was never decided."""


@contextmanager
def answered_in_time() -> Iterator[None]:
    """Raise `Unanswered` if the block waits for longer than `PATIENCE`."""
    try:
        with trio.fail_after(PATIENCE):
            yield
    except trio.TooSlowError:
        raise Unanswered(f"the daemon did not answer within {PATIENCE:g} s") from None
