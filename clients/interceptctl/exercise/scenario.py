"""How long an exercise is, how wide, and from which seed.

Owns the numbers that are chosen beforehand, with the defaults of `make run`; must not know what they do.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import Final

from .memory import Setting

DEFAULT_SEED: Final = 1
DEFAULT_VPS: Final = 8
DEFAULT_SECONDS: Final = 12.0
MOST_VPS: Final = 256
"""What a daemon allows a partition, unless configured lower."""


@dataclass(frozen=True, slots=True)
class Scenario:
    """Ends after `steps` or `seconds`, whichever is first; None is no limit.

    A step is one request of the VMM or a notifier that changes something; looking is none.
    """

    seed: int = DEFAULT_SEED
    vps: int = DEFAULT_VPS
    steps: int | None = None
    seconds: float | None = None
    setting: Setting = Setting.LIVE
    touches_a_deed: int = 3
    """Guests and VMM keep pace: so many touches for each thing that the VMM does."""

    @property
    def step_limit(self) -> float:
        return math.inf if self.steps is None else self.steps

    @property
    def time_limit(self) -> float:
        return math.inf if self.seconds is None else self.seconds

    def rng(self, who: str) -> random.Random:
        """Each task draws from its own: what one does never depends on how fast another is."""
        return random.Random(f"{self.seed}/{who}")
