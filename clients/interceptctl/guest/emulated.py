"""What the small VMM emulates: the report port and a scratch register.

Owns their behaviour; must not know the guest.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from typing import Final

REPORTS_KEPT: Final = 4096
"""A guest can report tens of thousands of values per second; older ones are counted and dropped."""
PATIENCE: Final = 60.0
"""Seconds to wait for a report before giving up: a guard against hanging, like STOP_SECONDS."""


class Reports:
    """A port that records what guests write to it. Thread-safe."""

    def __init__(self) -> None:
        self._news = threading.Condition()
        self._kept: deque[int] = deque(maxlen=REPORTS_KEPT)
        self._values: set[int] = set()
        self._count = 0

    def read(self, offset: int, size: int) -> bytes:  # noqa: ARG002 - nothing to be read
        return bytes(size)

    def write(self, offset: int, data: bytes) -> None:  # noqa: ARG002 - one port
        with self._news:
            value = int.from_bytes(data, "little")
            self._kept.append(value)
            self._values.add(value)
            self._count += 1
            self._news.notify_all()

    @property
    def count(self) -> int:
        """How many reports came so far."""
        with self._news:
            return self._count

    @property
    def kept(self) -> list[int]:
        """The latest reports, oldest first."""
        with self._news:
            return list(self._kept)

    def take_values(self) -> set[int]:
        """Each value that was reported since this was called last."""
        with self._news:
            values, self._values = self._values, set()
            return values

    def clear(self) -> None:
        """Drop the recorded reports; the count continues."""
        with self._news:
            self._kept.clear()

    def wait(self, more: int = 1) -> list[int]:
        """Block until `more` further reports have come; returns them. Raises TimeoutError."""
        with self._news:
            first = self._count
            self._wait(lambda: self._count >= first + more)
            return list(self._kept)[-more:]

    def wait_for(self, value: int) -> None:
        """Block until `value` is reported from now on. Raises TimeoutError."""
        with self._news:
            self._kept.clear()
            self._wait(lambda: value in self._kept)

    def _wait(self, there: Callable[[], bool]) -> None:
        if not self._news.wait_for(there, PATIENCE):
            raise TimeoutError(f"the guest did not report it within {PATIENCE:g} s")


class Scratch:
    """Device memory that remembers what was written, and counts accesses."""

    def __init__(self, length: int) -> None:
        self._memory = bytearray(length)
        self.accesses = 0

    def read(self, offset: int, size: int) -> bytes:
        self.accesses += 1
        return bytes(self._memory[offset : offset + size])

    def write(self, offset: int, data: bytes) -> None:
        self.accesses += 1
        self._memory[offset : offset + len(data)] = data
