"""The lag of the event loop: a task that runs long delays all others.

Owns a task that sleeps, and measures how late it wakes up. Must not know what delays it.
"""

from __future__ import annotations

from typing import Final

import trio

from interceptd.telemetry.histogram import LatencyHistogram

PERIOD_SECONDS: Final = 0.25
"""Four wake-ups per second cost little, and catch every delay of 0.25 s or more."""


class LoopLag:
    """`longest_ns` is the maximum since the start."""

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
