"""Lists whose length a client chooses, and which one task fills, uses and frees.

Owns how they grow and how they are freed. Must not know what they hold. A plain list of a million items is
copied to new memory as it grows, which takes 4 ms, and freed in one step, which takes 70 ms.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Generic, TypeVar

import msgspec

from interceptd.pages.untracked import untracked
from interceptd.scheduling.time_share import give_way_shielded

PART = 64
"""Items from which on a part is full. It is freed before the time is looked at."""
Item = TypeVar("Item")


class LongList(msgspec.Struct, Generic[Item], eq=False, gc=False):
    """Grows at its end, by parts that are never moved. The garbage collector visits the last part only."""

    _full: list[list[Item]] = []  # each has its own, as with any `Struct`
    _last: list[Item] = []
    _in_full: int = 0

    def __len__(self) -> int:
        return self._in_full + len(self._last)

    def __iter__(self) -> Iterator[Item]:
        for part in self._full:
            yield from part
        yield from self._last

    def append(self, item: Item) -> None:
        self.extend((item,))

    def extend(self, few: Iterable[Item]) -> None:
        """Add items, which stay together."""
        if len(self._last) >= PART:
            self._full.append(untracked(self._last))
            self._in_full += len(self._last)
            self._last = []
        self._last += few

    async def free(self) -> None:
        """Empty the list, and let others run meanwhile."""
        self._last.clear()
        while self._full:
            await give_way_shielded()
            self._in_full -= len(self._full.pop())
