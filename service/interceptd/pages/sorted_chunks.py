"""A sorted sequence that may get very long: an edit moves only the items of one chunk.

Owns the order. Must not know what the items are: the caller passes in the key by which they are sorted,
always the same one. In one list, an edit among a million items would move 8 MB. Many sequences have two
items; sortedcontainers' SortedKeyList would take 0.8 KiB for each.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar

import msgspec

from interceptd.pages.untracked import untracked

CHUNK = 512
"""Items at which a chunk is split."""
Item = TypeVar("Item")
Key = TypeVar("Key", bound=tuple[Any, ...])


class SortedChunks(msgspec.Struct, Generic[Item, Key], eq=False, gc=False):
    """At least one item, with distinct keys. Do not edit it while iterating."""

    _chunks: list[list[Item]]
    """None of them is empty."""

    @classmethod
    def of(cls, item: Item) -> SortedChunks[Item, Key]:
        return cls(untracked([untracked([item])]))

    def __iter__(self) -> Iterator[Item]:
        for chunk in self._chunks:
            yield from chunk

    def __reversed__(self) -> Iterator[Item]:
        for chunk in reversed(self._chunks):
            yield from reversed(chunk)

    @property
    def last(self) -> Item:
        return self._chunks[-1][-1]

    @property
    def only(self) -> Item | None:
        """The item, if there is just one."""
        return self._chunks[0][0] if len(self._chunks) == len(self._chunks[0]) == 1 else None

    def add(self, item: Item, key: Callable[[Item], Key]) -> None:
        """Insert an item; there must be none with its key yet."""
        wanted = key(item)
        at = self._chunk(wanted, key)
        chunk = self._chunks[at]
        chunk.insert(bisect_left(chunk, wanted, key=key), item)
        if len(chunk) > CHUNK:
            self._chunks.insert(at + 1, untracked(chunk[CHUNK // 2 :]))
            del chunk[CHUNK // 2 :]

    def remove(self, wanted: Key, key: Callable[[Item], Key]) -> None:
        """Remove the item with this key, which must be there, and another beside it."""
        at = self._chunk(wanted, key)
        chunk = self._chunks[at]
        place = bisect_left(chunk, wanted, key=key)
        assert [key(item) for item in chunk[place : place + 1]] == [wanted], "it was added"
        del chunk[place]
        if not chunk:
            del self._chunks[at]

    def _chunk(self, wanted: Key, key: Callable[[Item], Key]) -> int:
        """The last one that does not begin behind `wanted`, or the first."""
        return max(0, bisect_right(self._chunks, wanted, key=lambda chunk: key(chunk[0])) - 1)
