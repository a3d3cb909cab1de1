"""What was found, how bad that is, and how it is mended.

Owns the words; must not know how anything is found out.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Setting(StrEnum):
    """What the daemon is used for, each with what the one before it needs."""

    MODEL = "model"
    LIVE = "live"
    GUESTS = "guests"

    @property
    def included(self) -> frozenset[Setting]:
        """This setting and those before it."""
        settings = list(Setting)
        return frozenset(settings[: settings.index(self) + 1])


class State(StrEnum):
    """How much of what is needed there is."""

    OK = "ok"
    LIMITED = "limited"
    """It works without, and something is lost."""
    MISSING = "missing"


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at. `mend` is empty where nothing needs to be done."""

    name: str
    setting: Setting
    state: State
    found: str
    mend: str = ""
