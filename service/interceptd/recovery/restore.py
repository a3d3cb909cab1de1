"""Gives a new partition the state of a log.

Owns which of its mappings to believe: one that no region explains belongs to an unfinished call, and is
unmapped. Must not know connections. Nobody else uses the partition yet.
"""

from __future__ import annotations

from collections.abc import Sequence

from intercept_protocol.addresses import GfnRange, UaddrRange
from intercept_protocol.messages import MmioGranularity
from interceptd.address_space.declared import DeclaredAddressSpace
from interceptd.memory.region_change import union
from interceptd.partition.partition import Partition
from interceptd.recovery.fold import Fold, region_of
from interceptd.scheduling.time_share import give_way
from interceptd.telemetry.counters import Source


async def restore(partition: Partition, fold: Fold) -> list[GfnRange]:
    """Install the fold, which gives up its regions, VMAs and table. Returns the gfns that `settle` must unmap
    before a VP or the VMM is served. Lets others run meanwhile."""
    regions = partition.regions
    if fold.mmio_granularity is not None:
        regions.mmio_granularity = MmioGranularity(fold.mmio_granularity)
    while fold.regions:
        _, kept = fold.regions.popitem()
        regions.take_over(region_of(kept))
        await give_way()
    if isinstance(partition.memory, DeclaredAddressSpace):
        partition.memory.take_over(fold.vmas)
    partition.table.take_over(fold.table)
    strays: list[GfnRange] = []
    for entry in partition.table:
        strays += await regions.take_over_mapping(entry)
        await give_way()
    for gfns in fold.doubt:
        strays.append(gfns)
        await regions.doubt(gfns)
    return union(strays)


def announce(partition: Partition, fold: Fold) -> None:
    """Reopen the ranges that were open, and invalidate again what was not served. Call it after `restore`."""
    for begun in fold.begun.values():
        for uaddrs in begun.elements():
            partition.notifier.reopen(uaddrs)
    for gone in fold.gone.values():
        uaddrs = UaddrRange(start=gone.start_page, end=gone.end_page)
        partition.notifier.invalidate_again(uaddrs, Source.USERFAULTFD)


async def settle(partition: Partition, strays: Sequence[GfnRange]) -> None:
    """Unmap what `restore` returned, and map the gaps of movable regions NO_ACCESS. Raises `HypervisorError`:
    then the partition must end."""
    await partition.regions.unmap_unrecorded(strays)
    await partition.regions.close_gaps(partition.table)
