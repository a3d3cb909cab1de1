"""What was found, how bad it is, and how to fix it.

Owns the types; must not know how anything is probed.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Mode(StrEnum):
    """What the daemon is used for. Each mode also needs what those before it need."""

    MODEL = "model"
    LIVE = "live"
    GUESTS = "guests"

    @property
    def included(self) -> frozenset[Mode]:
        """This mode and those before it."""
        modes = list(Mode)
        return frozenset(modes[: modes.index(self) + 1])


class State(StrEnum):
    """Whether what is needed is there."""

    OK = "ok"
    LIMITED = "limited"
    """interceptd works without it, with a restriction."""
    MISSING = "missing"


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was checked. `fix` is empty if nothing needs to be done."""

    name: str
    mode: Mode
    state: State
    found: str
    fix: str = ""
