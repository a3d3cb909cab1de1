"""How many of one thing a uid has, and may have.

Owns one count, its limit, and what the counted ones take of the uid's memory. Must not know what is counted,
nor who else has some.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from intercept_protocol.errors import WireError
from interceptd.memory_budget import MemoryShare


class Quota:
    """The caller that acquires one releases it when it is gone. `limit` is asked at each acquisition. With
    `memory`, each takes `cost` bytes of it.

    Of what is cut and joined, like mappings, `count` follows each change (`CountedRangeMap`); the caller asks
    with `require` or `has_room` before it makes more.
    """

    __slots__ = ("_cost", "_limit", "_limit_name", "_memory", "_noun", "_uid", "count")

    def __init__(
        self,
        uid: int,
        noun: str,
        limit_name: str,
        limit: Callable[[], int],
        *,
        memory: MemoryShare | None = None,
        cost: int = 0,
    ) -> None:
        self._uid = uid
        self._noun = noun
        self._limit_name = limit_name
        self._limit = limit
        self._memory = memory
        self._cost = cost
        self.count = 0

    def has_room(self, more: int) -> bool:
        """Whether there may be so many more."""
        if self.count + more > self._limit():
            return False
        return self._memory is None or self._memory.has_room(more * self._cost)

    def acquire(self) -> None:
        """Count one more. Raises ENOSPC, with the limit's name, if that would be one too many."""
        self.require(1)
        self.change(1)

    def require(self, more: int) -> None:
        """Raise ENOSPC, with the limit's name, if `more` would be too many. Counts nothing."""
        if not self.has_room(more):
            raise self.refusal(more)

    def refusal(self, more: int) -> WireError:
        """The error of one who wants so many more, which is too many."""
        if self._memory is not None and self.count + more <= self._limit():
            return self._memory.refusal()
        return WireError(
            errno.ENOSPC, f"uid {self._uid} may have {self._limit()} {self._noun}", limit=self._limit_name
        )

    def add(self, count: int) -> None:
        """Count what exists already, even beyond the limit."""
        self.change(count)

    def change(self, by: int) -> None:
        """Count what has come or, if negative, has gone, whatever the limits are."""
        self.count += by
        if self._memory is not None:
            self._memory.change(by * self._cost)

    def release(self, count: int = 1) -> None:
        assert count <= self.count, f"uid {self._uid} has {self.count} {self._noun}, and releases {count}"
        self.change(-count)

    @contextmanager
    def acquired(self) -> Iterator[None]:
        """Acquire one, and keep it unless the block raises."""
        self.acquire()
        try:
            yield
        except BaseException:
            self.release()
            raise

    @contextmanager
    def reserved(self, count: int) -> Iterator[None]:
        """Keep room for `count` more until the end of the block. Raises like `require`, but never for none:
        what exceeds a lowered limit stays."""
        if count:
            self.require(count)
        self.change(count)
        try:
            yield
        finally:
            self.change(-count)
