"""One exercise of one daemon, for tests.

Owns the commands of mutant daemons; must not know what is expected of them.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from fakes import mutant_daemon
from interceptctl.exercise.daemon_process import KEPT_DAEMON, running_daemon
from interceptctl.exercise.exercise import exercise
from interceptctl.exercise.live import watch_nothing
from interceptctl.exercise.report import Report
from interceptctl.exercise.scenario import Scenario

_MUTANT: Final = (sys.executable, str(Path(mutant_daemon.__file__)))
WITHOUT_INVALIDATION: Final = (*_MUTANT, "without-invalidation")
WITHOUT_STALENESS_CHECK: Final = (*_MUTANT, "without-staleness-check")


async def exercised(scenario: Scenario, command: Sequence[str] = KEPT_DAEMON, *, chaos: int = 0) -> Report:
    """Exercise a daemon whose ports yield up to `chaos` times."""
    async with running_daemon(("env", f"INTERCEPTD_CHAOS={chaos}", *command)) as daemon:
        return await exercise(daemon.path, scenario, watch_nothing, daemon.kill)
