"""How much memory the daemon may use, and what the clients of each uid hold of it.

Owns the estimate, from what is counted, and the rule of fairness: one uid holds at most three times what it
leaves free, and its caches an eighth of it. An estimate, because it is exact, the same on every machine, and
known before anything is allocated. Must not know what is counted.
"""

from __future__ import annotations

import errno
import resource
import sys
import threading
from collections.abc import Callable
from enum import IntEnum
from pathlib import Path
from typing import Final

from intercept_protocol.errors import WireError

SHARE: Final = 3
"""A uid may hold so many times as much as it leaves free, so the next uid finds room."""
CACHES: Final = 8
"""A uid's caches hold at most one of so many bytes that are free: they never crowd out what is needed."""
UNREAD_ANSWERS: Final = 112 << 10
UNREAD_REQUESTS: Final = 24 << 10
"""What a VMM and its hypervisor do not read, in the kernel: see `connections.connection`."""
PENDING_INVALIDATIONS: Final = 60 << 10
"""Two batches, see `mmu_notifier.PENDING_PIECES`."""
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
    VMM = (128 << 10) + UNREAD_ANSWERS
    """With the same, as received and in its inbox."""
    PARTITION = (32 << 10) + UNREAD_REQUESTS + PENDING_INVALIDATIONS
    CACHED_VMA = 384
    """Of live memory."""


class MemoryBudget:
    """Of the whole daemon, in bytes. `limit` is asked each time; `base` is what the daemon takes alone."""

    __slots__ = ("_limit", "base", "cached", "changing_caches", "held")

    def __init__(self, limit: Callable[[], int], base: int = 0) -> None:
        self._limit = limit
        self.base = base
        self.held = 0
        """For all clients, without their caches."""
        self.cached = 0
        """In their caches. Worker threads change it, with the lock; anybody may read it."""
        self.changing_caches = threading.Lock()

    @property
    def limit(self) -> int:
        return self._limit()

    @property
    def estimated(self) -> int:
        """What the daemon takes."""
        return self.base + self.held + self.cached

    @property
    def free(self) -> int:
        """Negative if a lowered limit is exceeded."""
        return self._limit() - self.base - self.held - self.cached


def unlimited() -> MemoryBudget:
    return MemoryBudget(lambda: sys.maxsize)


class MemoryShare:
    """What the clients of one uid hold."""

    __slots__ = ("_budget", "_uid", "cached", "held")

    def __init__(self, uid: int, budget: MemoryBudget) -> None:
        self._uid = uid
        self._budget = budget
        self.held = 0
        """Without caches."""
        self.cached = 0

    def change(self, by: int) -> None:
        """Count bytes that are there now, or, if negative, are no more. Refuses nothing."""
        self.held += by
        self._budget.held += by

    def has_room(self, more: int) -> bool:
        """Whether the uid may hold so many bytes more."""
        return self.held + self.cached + more <= SHARE * (self._budget.free - more)

    def refusal(self) -> WireError:
        """The error of one who wants more."""
        held_mib = (self.held + self.cached) >> 20
        return WireError(
            errno.ENOSPC,
            f"uid {self._uid} holds {held_mib} MiB of the daemon's memory, and others need room, too: "
            f"limits.{LIMIT_NAME} is {self._budget.limit >> 20}",
            limit=LIMIT_NAME,
        )

    def change_cached(self, by: int) -> bool:
        """Count bytes of a cache, if there is room; always, if they are less. For any thread."""
        with self._budget.changing_caches:
            if by > 0 and CACHES * (self.cached + by) > self._budget.free - by:
                return False
            self.cached += by
            self._budget.cached += by
            return True


class CacheShare:
    """What one cache holds, each of its entries taking `cost` bytes. Its methods are for any thread, but for
    one at a time."""

    __slots__ = ("_cost", "_entries", "_memory")

    def __init__(self, memory: MemoryShare, cost: int) -> None:
        self._memory = memory
        self._cost = cost
        self._entries = 0

    @property
    def held(self) -> int:
        """Bytes."""
        return self._entries * self._cost

    def resize(self, entries: int) -> bool:
        """Whether the cache may have so many entries; it is counted with them then. Fewer are always fine."""
        if entries != self._entries:
            if not self._memory.change_cached((entries - self._entries) * self._cost):
                return False
            self._entries = entries
        return True


def uncounted() -> CacheShare:
    """The share of a cache that nothing bounds but itself."""
    return CacheShare(MemoryShare(0, unlimited()), cost=0)


def resident_bytes() -> int:
    """What this process has in memory now."""
    return int(_STATM.read_text().split()[1]) * resource.getpagesize()
