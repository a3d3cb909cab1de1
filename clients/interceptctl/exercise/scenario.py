"""The length, number of VPs and seed of an exercise.

Owns these parameters, with the defaults of `make run`; must not know their effects.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import Final

from .memory import Mode

DEFAULT_SEED: Final = 1
DEFAULT_VPS: Final = 8
DEFAULT_SECONDS: Final = 12.0
DEFAULT_KILLS: Final = 2
"""Of a private daemon."""
MOST_VPS: Final = 256
"""The most VPs that a daemon allows per partition, unless configured lower."""


@dataclass(frozen=True, slots=True)
class Scenario:
    """Ends after `steps` or `seconds`, whichever comes first, but not before the daemon was killed `kills`
    times; None is no limit.

    A step is one request of the VMM or of a notifier that changes something.
    """

    seed: int = DEFAULT_SEED
    vps: int = DEFAULT_VPS
    steps: int | None = None
    seconds: float | None = None
    mode: Mode = Mode.LIVE
    kills: int = 0
    touches_per_action: int = 3
    """Touches by guests per action of the VMM, so that both keep pace."""

    @property
    def step_limit(self) -> float:
        return math.inf if self.steps is None else self.steps

    @property
    def time_limit(self) -> float:
        return math.inf if self.seconds is None else self.seconds

    def rng(self, who: str) -> random.Random:
        """Each task has its own generator, so its choices do not depend on the speed of another."""
        return random.Random(f"{self.seed}/{who}")
