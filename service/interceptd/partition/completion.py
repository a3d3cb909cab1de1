"""When a restored guest needs the daemon no more: all of its image is in.

Owns the look at what is missing, and leaving the guest to the kernel, which then fills with zeroes what the
VMM gives back. Must not know faults, nor how a page is brought in.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import structlog
import trio

from intercept_protocol.addresses import GfnRange
from intercept_protocol.events import RestoreComplete
from interceptd.address_space.image import ImageAddressSpace
from interceptd.hypervisor.userfaultfd import UserfaultfdHypervisor
from interceptd.memory.region import Region
from interceptd.scheduling.time_share import give_way
from interceptd.telemetry.event_bus import PartitionPublisher

log = structlog.get_logger()

LOOK_SECONDS: Final = 1.0


class Completion:
    """`regions` are all of the guest, and stay."""

    def __init__(
        self,
        regions: Sequence[Region],
        memory: ImageAddressSpace,
        hypervisor: UserfaultfdHypervisor,
        event_bus: PartitionPublisher,
    ) -> None:
        self._regions = regions
        self._memory = memory
        self._hypervisor = hypervisor
        self._event_bus = event_bus
        self.reached = False

    async def watch(self) -> None:
        """Return once the guest is complete, or its VMM is gone, which another task may have been told."""
        table = self._hypervisor.table
        while True:
            await trio.sleep(LOOK_SECONDS)
            if self._hypervisor.vmm_gone:
                self._memory.vmm_gone.set()
                return
            # Only when so little is missing that the VMM may have given back all of it is a walk worth it.
            if table.no_access_gfns <= self._memory.removed_pages and await self.leave_to_kernel():
                return

    async def leave_to_kernel(self) -> bool:
        """If no page of the image is missing, unregister the guest's memory. Returns whether that is done.
        May block for the VMM's mmap lock."""
        if self.reached:
            return True
        if await self.missing_pages():
            return False
        try:
            await self._hypervisor.unregister([region.uaddrs for region in self._regions])
        except OSError as error:
            log.warning("unregister_refused", error=str(error))
            return False
        self.reached = True
        pages_in = self._hypervisor.counters().mapped_gfns
        log.info("restore_complete", pages_in=pages_in)
        self._event_bus.publish(RestoreComplete(pages_in=pages_in))
        return True

    async def missing_pages(self) -> int:
        """How many pages of the image are not in, and were not given back. Lets others run meanwhile."""
        count = 0
        for region in self._regions:
            rest = region.gfns
            while rest.page_count:
                part, entries = self._hypervisor.table.first_entries(rest)
                for entry in entries:
                    if not entry.access:
                        count += await self._memory.image_pages(region.uaddrs_of(entry.gfns))
                rest = GfnRange(start=part.end, end=rest.end)
                await give_way()
        return count
