"""How much memory the daemon may use, and what the clients of each uid hold of it.

Owns the estimate, from what is counted, and the rule of fairness: one uid holds at most three times what it
leaves free. An estimate, because it is exact, the same on every machine, and known before anything is
allocated. Must not know what is counted.
"""

from __future__ import annotations

import errno
import resource
import sys
from collections.abc import Callable
from enum import IntEnum
from pathlib import Path
from typing import Final

from intercept_protocol.errors import WireError

SHARE: Final = 3
"""A uid may hold so many times as much as it leaves free, so the next uid finds room."""
LIMIT_NAME: Final = "memory_mib"
_STATM: Final = Path("/proc/self/statm")


class Cost(IntEnum):
    """Bytes of one: at least what `tests/benchmarks/memory.py` finds with a keeper, whose ledger counts."""

    REGION = 1024
    MAPPING = 1024
    """With the NO_ACCESS entry that it may cut off."""
    VMA = 448
    OPEN_INVALIDATION = 768
    CONNECTION = 16 << 10
    """With answers that its peer does not read."""
    HELLO = 64 << 10
    """Of a connection without one: an unfinished message."""
    VP = 2 << 10
    VMM = 128 << 10
    """With the same, as received and in its inbox."""
    PARTITION = 32 << 10


class MemoryBudget:
    """Of the whole daemon, in bytes. `limit` is asked each time; `base` is what the daemon takes alone."""

    __slots__ = ("_limit", "base", "held")

    def __init__(self, limit: Callable[[], int], base: int = 0) -> None:
        self._limit = limit
        self.base = base
        self.held = 0
        """For all clients."""

    @property
    def limit(self) -> int:
        return self._limit()

    @property
    def estimated(self) -> int:
        """What the daemon takes."""
        return self.base + self.held

    @property
    def free(self) -> int:
        """Negative if a lowered limit is exceeded."""
        return self._limit() - self.base - self.held


def unlimited() -> MemoryBudget:
    return MemoryBudget(lambda: sys.maxsize)


class MemoryShare:
    """What the clients of one uid hold."""

    __slots__ = ("_budget", "_uid", "held")

    def __init__(self, uid: int, budget: MemoryBudget) -> None:
        self._uid = uid
        self._budget = budget
        self.held = 0

    def change(self, by: int) -> None:
        """Count bytes that are there now, or, if negative, are no more. Refuses nothing."""
        self.held += by
        self._budget.held += by

    def has_room(self, more: int) -> bool:
        """Whether the uid may hold so many bytes more."""
        return self.held + more <= SHARE * (self._budget.free - more)

    def refusal(self) -> WireError:
        """The error of one who wants more."""
        return WireError(
            errno.ENOSPC,
            f"uid {self._uid} holds {self.held >> 20} MiB of the daemon's memory, and others need room, too: "
            f"limits.{LIMIT_NAME} is {self._budget.limit >> 20}",
            limit=LIMIT_NAME,
        )


def resident_bytes() -> int:
    """What this process has in memory now."""
    return int(_STATM.read_text().split()[1]) * resource.getpagesize()
