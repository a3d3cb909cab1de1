"""How late the event loop is: what one task does for long, all others wait for.

Owns a task that sleeps, and how much later than it asked for it is run again. Must not know what delays it.
"""

from __future__ import annotations

from typing import Final

import trio

from interceptd.telemetry.histogram import LatencyHistogram

PERIOD_SECONDS: Final = 0.25
"""Four wake-ups a second cost nothing, and find what lasts a quarter of a second for certain."""


class LoopLag:
    """`longest_ns` is since the start."""

    def __init__(self) -> None:
        self.histogram = LatencyHistogram()
        self.longest_ns = 0

    async def run(self) -> None:
        """Measure until cancelled."""
        while True:
            due = trio.current_time() + PERIOD_SECONDS
            await trio.sleep_until(due)
            lag = int((trio.current_time() - due) * 1e9)
            self.histogram.record(lag)
            self.longest_ns = max(self.longest_ns, lag)
