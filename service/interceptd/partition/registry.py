"""The partitions of a daemon, from creation to end.

Owns the list of the current ones, and the totals of those that have ended. Must not know how they are built
or served.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain

import trio

from interceptd.partition.partition import Partition
from interceptd.scheduling.time_share import give_way
from interceptd.telemetry.counters import Totals


class PartitionRegistry:
    """In the order of their ids, which are never used again."""

    def __init__(self) -> None:
        self._partitions: dict[int, Partition] = {}
        self._left = trio.Event()
        self._ended = Totals()
        self.created = 0
        """Also those of predecessors: the last id."""
        self.lost = 0
        self.recovered = 0
        """Partitions of predecessors that came back."""
        self.not_recovered = 0
        """Partitions of predecessors that ended because they could not come back."""
        self.closed = False
        """Whether the daemon is ending: nothing is to be added any more."""

    def __len__(self) -> int:
        return len(self._partitions)

    def __iter__(self) -> Iterator[Partition]:
        return iter(list(self._partitions.values()))

    def find(self, partition_id: int) -> Partition | None:
        return self._partitions.get(partition_id)

    def next_id(self) -> int:
        return self.created + 1

    def reserve_id(self) -> int:
        """The next id, for a partition that is added later, or never."""
        self.created += 1
        return self.created

    def add(self, partition: Partition) -> None:
        self._partitions[partition.partition_id] = partition
        if partition.partition_id < self.created:  # a predecessor's, or reserved: they come in any order
            self._partitions = dict(sorted(self._partitions.items()))
        self.created = max(self.created, partition.partition_id)

    def remove(self, partition: Partition) -> None:
        """Forget an ended partition; its totals stay."""
        del self._partitions[partition.partition_id]
        self._ended.add(partition.totals())
        self.lost += partition.lost
        self._left.set()
        self._left = trio.Event()

    async def wait_empty(self) -> None:
        while self._partitions:
            await self._left.wait()

    async def totals(self) -> Totals:
        """Of all partitions that are or were. Lets others run meanwhile."""
        whole = Totals()
        for part in self.parts():
            whole.add(part)
            await give_way()
        return whole

    def parts(self) -> Iterator[Totals]:
        """What `totals` adds up, for a caller that lets other tasks run in between.

        Who is there is settled at once: a partition that ends meanwhile is counted once all the same.
        """
        ended, living = Totals(), list(self._partitions.values())
        ended.add(self._ended)
        return chain([ended], (partition.totals() for partition in living))
