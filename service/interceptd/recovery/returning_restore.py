"""One restore that comes back: it waits for its VMM again, or its guest is served again.

Owns what must be there for that, and what becomes of a VMM without it. Must not know how a page is brought
in. Nothing of the image is read here, which may take as long as its file system likes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import structlog

from intercept_protocol import codec, events
from intercept_protocol.messages import Restore
from intercept_protocol.text import sentence
from interceptd.address_space.image import ImageAddressSpace
from interceptd.address_space.missing_faults import removal_in
from interceptd.connections.peer import Pidfd
from interceptd.connections.tenants import Tenant
from interceptd.memory.region import Region
from interceptd.partition.handed_over import HandedOver, has_ended
from interceptd.partition.kept_restore import KeptRestore, regions_from
from interceptd.partition.partition import Partition
from interceptd.partition.restored_guest import Ending, RestoredGuest, abandon
from interceptd.recovery.fold import Fold
from interceptd.recovery.remains import Remains
from interceptd.recovery.restore import announce, restore, settle
from interceptd.scheduling.time_share import give_way
from interceptd.sessions.restore_source import PageList
from interceptd.sessions.restores import Restores, Returning
from interceptd.telemetry.counters import Source

log = structlog.get_logger()


class CannotReturn(Exception):
    """Something is missing; the text says what. `ending` is what became of the restore."""

    def __init__(self, ending: Ending, why: str) -> None:
        super().__init__(why)
        self.ending = ending


class VmmEnded(Exception):
    """Nobody is left to be served; the text says so."""


class LeftRestore(NamedTuple):
    """What a predecessor left of one restore."""

    remains: Remains
    fold: Fold
    kept: KeptRestore
    tenant: Tenant


class ReturningRestore:
    """Calls `found` once the restore is known, and `count` when its guest is served again."""

    def __init__(
        self, restores: Restores, left: LeftRestore, found: Callable[[], None], count: Callable[[int], None]
    ) -> None:
        self._restores = restores
        self._remains, self._fold, self._kept, self._tenant = left
        self._found = found
        self._count = count

    async def run(self) -> None:
        """Go on with it to its end. Raises `CannotReturn` and `VmmEnded`; then the caller lets go what there
        is."""
        record = self._fold.restoring
        assert record is not None, "else it was not answered"
        call = codec.decode_fields(Restore, Restore.METHOD, [record.request])
        try:
            vmm = self._vmm(call, record.partition_id)
        except VmmEnded:
            self._restores.remember(record.uid, record.partition_id, record.image_pages, Ending.ENDED)
            raise
        except CannotReturn as why:
            self._restores.remember(
                record.uid, record.partition_id, record.image_pages, why.ending, sentence(why)
            )
            raise
        remains = self._remains
        connection = None
        if vmm is None:
            _, connection = remains.connections.popitem() if remains.connections else (0, None)
        returning = Returning(
            call=call,
            name=record.name,
            partition_id=record.partition_id,
            tenant=self._tenant,
            asked_by=record.asked_by,
            kept=self._kept,
            image=remains.images.pop(),
            image_pages=record.image_pages,
            prefetch=PageList(remains.page_lists.pop()) if remains.page_lists else None,
            listener=remains.listeners.pop() if remains.listeners else None,
            connection=connection,
            vmm=vmm,
            bring_back=self._bring_back,
        )
        remains.let_go(self._tenant.closer)
        self._found()
        await self._restores.go_on(returning)

    def _vmm(self, call: Restore, partition_id: int) -> HandedOver | None:
        """What was handed over; None if nothing was yet."""
        handed_off, remains = self._fold.handed_off, self._remains
        if handed_off is None:
            if not (remains.images and remains.listeners):
                raise CannotReturn(Ending.NOT_CLAIMED, "its image and its listening socket were not kept")
            return None
        connection = remains.connections.get(handed_off.cookie)
        pidfd = None if connection is None else Pidfd.of(connection)
        if connection is None or pidfd is None:
            raise VmmEnded("its VMM has ended")
        if has_ended(pidfd):
            pidfd.close()
            raise VmmEnded("its VMM has ended")
        if not (remains.images and remains.memory):
            why = "its image and its VMM's memory were not kept"
            ended = abandon(pidfd, call.on_image_error, why, self._restores.publisher(partition_id))
            pidfd.close()
            raise CannotReturn(*ended)
        del remains.connections[handed_off.cookie]
        uffd = remains.memory.pop()
        return HandedOver(connection, pidfd, uffd, regions_from(handed_off), self._tenant.closer)

    async def _bring_back(self, partition: Partition, guest: RestoredGuest) -> None:
        await bring_back(partition, guest.regions, self._fold, self._kept.keeping.event)
        partition.is_back()
        self._count(1)
        statistics = partition.statistics()
        log.info("partition_recovered", regions=statistics.regions, connections=0)
        partition.event_bus.publish(
            events.PartitionRecovered(
                regions=statistics.regions, mappings=statistics.slat_extents, connections=0
            )
        )


async def bring_back(partition: Partition, regions: Sequence[Region], fold: Fold, event: memoryview) -> None:
    """Give a restored guest's partition what the log says, which the fold gives up, and act on the message
    that the predecessor read last: it may not have recorded that. Afterwards wake all who wait."""
    memory = partition.memory
    assert isinstance(memory, ImageAddressSpace), "it is a restored guest"
    for region in regions:
        partition.regions.take_over(region)
    for uaddrs in fold.removed:
        memory.removed(uaddrs)
        await give_way()
    while fold.removed.drop_some():
        await give_way()
    strays = await restore(partition, fold)
    announce(partition, fold)
    if (removed := removal_in(event)) is not None:
        memory.removed(removed)
        partition.notifier.invalidate(removed, Source.USERFAULTFD)
    event[:] = bytes(len(event))
    await settle(partition, strays)
