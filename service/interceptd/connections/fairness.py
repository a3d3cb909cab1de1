"""Fairness among the connections of the process that are answered without waiting.

Owns who was answered last and how often running. trio parks a task only when its socket is empty. A peer that
keeps it filled would starve the rest, so every connection yields at times. Must not know what is answered.
"""

from __future__ import annotations

TURN = 8
"""Messages that one connection is answered before the others get a turn."""
ALONE = 4 * TURN
"""Messages running after which a connection is taken to be the only busy one."""


class Turns:
    """One for all connections; one that others may wait for. Synchronous, so nothing comes in between.

    An object of its own and no attributes of a class: to set those, the interpreter forgets each time what it
    had learnt of the class (0.4 us of an intercept's 14).
    """

    __slots__ = ("_latest", "_running")

    def __init__(self) -> None:
        self._latest: object = None
        self._running = 0

    @property
    def is_lonely(self) -> bool:
        """Whether the last one is taken to be the only busy connection."""
        return self._running > ALONE

    def running(self, connection: object) -> int:
        """How often running it was this connection's turn, this time included."""
        if connection is not self._latest:
            self._latest, self._running = connection, 0
        self._running += 1
        return self._running
