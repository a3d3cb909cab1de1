"""The list of partitions."""

from __future__ import annotations

import pytest

from fakes.model_partition import ModelPartition
from interceptd.partition.registry import PartitionRegistry


@pytest.mark.parametrize("order", [(1, 2, 3), (3, 1, 2), (2, 3, 1)])
async def test_partitions_that_come_back_in_any_order_are_in_the_order_of_their_ids(
    order: tuple[int, ...],
) -> None:
    """Else a page of `list_partitions` repeats some of the last one, and leaves out others (O-1)."""
    registry = PartitionRegistry()
    for partition_id in order:
        registry.add(ModelPartition(partition_id=partition_id).partition)
    registry.add(ModelPartition(partition_id=registry.next_id()).partition)
    assert [partition.partition_id for partition in registry] == [1, 2, 3, 4]
