"""The partitions of a daemon, from creation to end.

Owns who is there and the totals of those that were. Must not know how they are built or served.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import trio

from intercept_protocol.outcomes import Answer
from interceptd.partition import Partition


class PartitionRegistry:
    """In the order of their ids, which are never used again."""

    def __init__(self) -> None:
        self._partitions: dict[int, Partition] = {}
        self._left = trio.Event()
        self._ended_answers: Counter[Answer] = Counter()
        self._ended_invalidations = 0
        self.created = 0
        self.lost = 0
        self.closed = False
        """Whether the daemon is ending: nothing is to be added any more."""

    def __len__(self) -> int:
        return len(self._partitions)

    def __iter__(self) -> Iterator[Partition]:
        return iter(list(self._partitions.values()))

    def find(self, partition_id: int) -> Partition | None:
        return self._partitions.get(partition_id)

    def of_uid(self, uid: int) -> Iterator[Partition]:
        return (partition for partition in self if partition.owner.uid == uid)

    def next_id(self) -> int:
        return self.created + 1

    def add(self, partition: Partition) -> None:
        self._partitions[partition.partition_id] = partition
        self.created = partition.partition_id

    def remove(self, partition: Partition) -> None:
        """Forget an ended partition; its totals stay."""
        del self._partitions[partition.partition_id]
        self._ended_answers += partition.answers
        self._ended_invalidations += partition.notifier.invalidations
        self.lost += partition.lost
        self._left.set()
        self._left = trio.Event()

    async def wait_empty(self) -> None:
        while self._partitions:
            await self._left.wait()

    @property
    def answers(self) -> Counter[Answer]:
        """Of all partitions that are or were."""
        return sum((partition.answers for partition in self), start=self._ended_answers)

    @property
    def invalidations(self) -> int:
        return self._ended_invalidations + sum(partition.notifier.invalidations for partition in self)
