"""Descriptors between a client's message and what is made of them.

Owns them meanwhile, and examines them in a worker thread: a peer decides how long examining or closing a file
on its FUSE mount takes. After a timeout the side that finishes last closes them. Must not know what they are.
"""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable
from typing import Generic, Protocol, TypeVar

import trio

from interceptd.address_space import Undecided
from interceptd.address_space.workers import Workers
from interceptd.connections.closer import Closer


class Closes(Protocol):
    def close(self) -> None:
        """Close the descriptors it was made of; never blocks."""


Made_co = TypeVar("Made_co", bound=Closes, covariant=True)


class Handover(Generic[Made_co]):
    """For one call of `made`. `examine` takes ownership of the descriptors, also if it raises; it runs in a
    worker and may block."""

    def __init__(
        self, descriptors: list[int], examine: Callable[[list[int]], Made_co], closer: Closer
    ) -> None:
        self._descriptors = descriptors
        self._examine = examine
        self._closer = closer
        self._lock = threading.Lock()
        self._begun = False
        self._abandoned = False
        self._made: Made_co | None = None

    async def made(self, seconds: float, workers: Workers) -> Made_co:
        """Blocks for up to `seconds`, then raises `Undecided`. Raises what `examine` raises."""
        try:
            with trio.fail_after(seconds):
                return await workers.ask(self._make)
        except trio.TooSlowError:
            self._abandon()
            raise Undecided("examining a descriptor timed out", errno.ETIMEDOUT) from None
        except BaseException:
            self._abandon()
            raise

    def _make(self) -> Made_co:
        with self._lock:
            if self._abandoned:
                raise Undecided("abandoned before it began")
            self._begun = True
        made = self._examine(self._descriptors)
        with self._lock:
            self._made = made
            if self._abandoned:
                made.close()
        return made

    def _abandon(self) -> None:
        with self._lock:
            self._abandoned = True
            if not self._begun:
                self._closer.close(self._descriptors)
            if self._made is not None:
                self._made.close()
