"""An ordered map from page numbers, optimised for one query: which entry starts at or below a page?

Owns the order. Must not know what the values mean. Keys are stored in chunks of up to `CHUNK`; a look-up
bisects the first keys of the chunks, then one chunk. sortedcontainers' SortedDict answers the query only by
`irange`, a generator, which is slower. Keys are packed integers instead of objects, each of which would cost
a cache miss. An edit costs O(log n) and a move within a chunk. `make bench-scale` measures look-ups.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from typing import Generic, TypeVar

from interceptd.pages.untracked import untracked

CHUNK = 512
"""Entries at which a chunk is split. A million entries make 2,000 to 4,000 chunks, so a split moves up to 32
KiB of first keys, at most once in 256 edits."""
Value = TypeVar("Value")


class OrderedMap(Generic[Value]):
    """Values by distinct integer keys in [0, 2^64), in order. Do not edit it while iterating."""

    __slots__ = ("_firsts", "_keys", "_size", "_values")

    def __init__(self) -> None:
        self._firsts = array("Q")  # the first key of each chunk; no chunk is empty
        self._keys: list[array[int]] = []
        self._values: list[list[Value]] = []
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def __iter__(self) -> Iterator[Value]:
        """The values, in the order of their keys."""
        for values in self._values:
            yield from values

    def floor(self, key: int) -> Value | None:
        """The value of the greatest key at or below `key`."""
        chunk = bisect_right(self._firsts, key) - 1
        if chunk < 0:
            return None
        return self._values[chunk][bisect_right(self._keys[chunk], key) - 1]

    def get(self, key: int) -> Value | None:
        """The value of exactly this key."""
        chunk = bisect_right(self._firsts, key) - 1
        if chunk < 0:
            return None
        keys = self._keys[chunk]
        at = bisect_right(keys, key) - 1
        return self._values[chunk][at] if keys[at] == key else None

    def floor_and_next(self, key: int) -> tuple[Value | None, Value | None]:
        """The value of the greatest key at or below `key`, and the next one in order."""
        chunk = bisect_right(self._firsts, key) - 1
        if chunk < 0:
            return None, self._values[0][0] if self._firsts else None
        values = self._values[chunk]
        at = bisect_right(self._keys[chunk], key)
        if at < len(values):
            return values[at - 1], values[at]
        return values[at - 1], self._values[chunk + 1][0] if chunk + 1 < len(self._values) else None

    def between(self, start: int, end: int) -> Iterator[Value]:
        """The values of the keys in [start, end), in order."""
        chunk = max(bisect_right(self._firsts, start) - 1, 0)
        while chunk < len(self._firsts) and self._firsts[chunk] < end:
            keys = self._keys[chunk]
            yield from self._values[chunk][bisect_left(keys, start) : bisect_left(keys, end)]
            chunk += 1

    def __setitem__(self, key: int, value: Value) -> None:
        if not self._firsts:
            self._put_in_chunk(0, array("Q", [key]), [value])
            self._size = 1
            return
        chunk = bisect_right(self._firsts, key) - 1
        if chunk < 0:
            chunk = 0
            self._firsts[0] = key
        keys, values = self._keys[chunk], self._values[chunk]
        at = bisect_left(keys, key)
        if at < len(keys) and keys[at] == key:
            values[at] = value
            return
        keys.insert(at, key)
        values.insert(at, value)
        self._size += 1
        if len(keys) > CHUNK:
            self._put_in_chunk(chunk + 1, keys[CHUNK // 2 :], values[CHUNK // 2 :])
            del keys[CHUNK // 2 :], values[CHUNK // 2 :]

    def move(self, key: int, to: int, value: Value) -> None:
        """Give the entry with this key another value, and a key from its own to below the next one."""
        chunk = bisect_right(self._firsts, key) - 1
        keys = self._keys[chunk]
        at = bisect_left(keys, key)
        keys[at] = to
        self._values[chunk][at] = value
        if not at:
            self._firsts[chunk] = to

    def pop(self, key: int) -> Value:
        """Remove and return the value of exactly this key. Raises KeyError for a missing key."""
        chunk = bisect_right(self._firsts, key) - 1
        if chunk < 0:
            raise KeyError(key)
        keys = self._keys[chunk]
        at = bisect_right(keys, key) - 1  # at least 0: the chunk's first key is not above `key`
        if keys[at] != key:
            raise KeyError(key)
        del keys[at]
        value = self._values[chunk].pop(at)
        self._size -= 1
        if keys:
            self._firsts[chunk] = keys[0]
        if len(keys) < CHUNK // 4:
            self._join_with_neighbour(chunk)
        return value

    __delitem__ = pop

    def drop_some(self) -> bool:
        """Remove up to `CHUNK` entries; False if there are none. Freeing a million in one step would take
        some 100 ms."""
        if not self._firsts:
            return False
        self._size -= len(self._keys.pop())
        self._firsts.pop()
        self._values.pop()
        return True

    def _put_in_chunk(self, at: int, keys: array[int], values: list[Value]) -> None:
        self._firsts.insert(at, keys[0])
        self._keys.insert(at, keys)
        self._values.insert(at, untracked(values))

    def _join_with_neighbour(self, chunk: int) -> None:
        """Merge a short chunk with a neighbour if both fit into one, so that chunks stay few."""
        before = chunk - 1 if chunk else chunk + 1
        if before == len(self._firsts):  # the only chunk
            if not self._keys[chunk]:
                del self._firsts[chunk], self._keys[chunk], self._values[chunk]
            return
        left, right = min(chunk, before), max(chunk, before)
        if len(self._keys[left]) + len(self._keys[right]) > CHUNK:
            return
        self._keys[left] += self._keys[right]
        self._values[left] += self._values[right]
        del self._firsts[right], self._keys[right], self._values[right]
        self._firsts[left] = self._keys[left][0]
