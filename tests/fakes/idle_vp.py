"""A VP that waits for nothing, and remembers what it was told."""

from __future__ import annotations


class IdleVp:
    def __init__(self) -> None:
        self.told = ""

    def kick(self) -> None:
        self.told = "kicked"

    def drain(self) -> None:
        self.told = "drained"

    async def wait_quiet(self) -> None:
        """It always is."""
