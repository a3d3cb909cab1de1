"""What a VMM handed over: its process, its userfaultfd, and where in it which part of the image belongs.

Owns the connection, the pidfd and the userfaultfd until they are closed. Must not know how they were
received, nor who brings pages in.
"""

from __future__ import annotations

import select
import socket
from collections.abc import Sequence

from intercept_protocol.addresses import PAGE_SHIFT, PAGE_SIZE, GfnRange, UaddrRange
from intercept_protocol.handoff import HandoffRegion
from intercept_protocol.messages import RegionKind
from intercept_protocol.outcomes import Access
from interceptd.address_space.image import ImagePart
from interceptd.connections.closer import Closer
from interceptd.connections.peer import Peer, Pidfd
from interceptd.memory.region import KindOrigin, Region

_ALL_RIGHTS = Access.READ | Access.WRITE | Access.EXECUTE


class HandedOver:
    """One hand-off. `closer` closes the connection, the pidfd and the userfaultfd."""

    def __init__(
        self,
        connection: socket.socket,
        pidfd: Pidfd,
        userfaultfd: int,
        regions: Sequence[HandoffRegion],
        closer: Closer,
    ) -> None:
        self.connection = connection
        """Nothing comes over it any more, and its end means nothing (Firecracker up to 1.11 closes it)."""
        self.peer = Peer.of(connection)
        self.pidfd = pidfd
        self.userfaultfd = userfaultfd
        self.regions = regions
        self.unit = regions[0].page_size // PAGE_SIZE
        """Of 4 KiB: the pages of all regions have one size."""
        self._closer = closer

    def close(self) -> None:
        """Does not block, though to close a userfaultfd waits for the mmap lock of its process."""
        self._closer.close_connection(self.connection.detach())
        self.close_memory()

    def close_memory(self) -> None:
        """The same, but for the connection."""
        self._closer.close([self.userfaultfd])
        self.pidfd.close()


def has_ended(process: Pidfd) -> bool:
    """Whether the process has exited."""
    poll = select.poll()
    poll.register(process, select.POLLIN)
    return bool(poll.poll(0))


def parts_of(vmm: HandedOver) -> list[ImagePart]:
    """Where in the VMM which part of the image belongs."""
    return [
        ImagePart(
            region.base_host_virt_addr >> PAGE_SHIFT,
            (region.base_host_virt_addr + region.size) >> PAGE_SHIFT,
            region.offset >> PAGE_SHIFT,
        )
        for region in vmm.regions
    ]


def regions_of(vmm: HandedOver, around_pages: int) -> list[Region]:
    """The same as regions: a gfn is a page number of the image."""
    return [
        Region(
            gfns=GfnRange.of(region.offset >> PAGE_SHIFT, region.size >> PAGE_SHIFT),
            uaddrs=UaddrRange.of_pages(region.base_host_virt_addr, region.size >> PAGE_SHIFT),
            kind=RegionKind.MOVABLE,
            kind_origin=KindOrigin.STATED,
            access=_ALL_RIGHTS,
            block=max(around_pages, vmm.unit),
        )
        for region in vmm.regions
    ]
