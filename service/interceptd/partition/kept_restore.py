"""Has the service manager keep a restore for the next daemon: its ledger, its files, what its VMM hands over.

Owns the order in which they are stored and recorded. Must not know who serves the guest.

A restore belongs to no connection, so its listening socket names it, which it has from the first moment on.
What a VMM hands over is stored before it is recorded, and recorded before the hand-off is read from its
connection: a successor that finds the connection alone looks again.
"""

from __future__ import annotations

import socket
from collections.abc import Sequence

from intercept_protocol import codec
from intercept_protocol.handoff import HandoffRegion
from intercept_protocol.messages import Restore, RestoreReply
from interceptd.connections.socket_cookie import cookie_of
from interceptd.connections.tenants import Tenant
from interceptd.ledger import records
from interceptd.partition.keeping import Keeper, Keeping, key_of

Request = tuple[int, int]
"""SO_COOKIE of the connection that asked, and `Inbox.serial` of what it asked."""


class KeptRestore:
    """Of one restore."""

    def __init__(self, keeping: Keeping) -> None:
        self.keeping = keeping

    @classmethod
    async def begin(
        cls, keeper: Keeper, tenant: Tenant, listener: socket.socket, image: int, prefetch: int | None
    ) -> KeptRestore | None:
        """Keep what came with a request that is not answered yet. None if nothing is kept."""
        keeping = keeper.new_keeping(tenant, key_of(cookie_of(listener)))
        if keeping is None:
            return None
        try:
            await keeping.keep("p", keeping.ledger.descriptor, poll=False)
            await keeping.keep("l", listener.fileno(), poll=False)
            await keeping.keep("i", image, poll=False)
            if prefetch is not None:
                await keeping.keep("f", prefetch, poll=False)
        except BaseException:
            keeping.end()
            raise
        return cls(keeping)

    def requested(
        self, asked_by: Request | None, tenant: Tenant, reply: RestoreReply, name: str, call: Restore
    ) -> None:
        """The request is carried out; its answer is owed."""
        request = codec.to_fields(call)
        self.keeping.journal.append(
            records.Restoring(tenant.uid, reply.partition_id, name, reply.image_pages, request, asked_by)
        )

    async def connected(self, connection: socket.socket) -> None:
        """Keep a connection that may bring a hand-off. It may close before the hand-off is read."""
        await self.keeping.keep("c", connection.fileno(), poll=False)

    def refused(self) -> None:
        """The connection brought none, and is closed."""
        self.keeping.drop("c")

    async def handed_off(
        self, connection: socket.socket, userfaultfd: int, regions: Sequence[HandoffRegion]
    ) -> None:
        """Keep the memory, and record that it was handed over."""
        await self.keeping.forget_memory()  # of a predecessor that died before it recorded this
        await self.keeping.keep("m", userfaultfd, poll=False)
        self.keeping.journal.append(
            records.HandedOff(
                cookie_of(connection),
                [(each.base_host_virt_addr, each.size, each.offset, each.page_size) for each in regions],
            )
        )
        self.keeping.drop("l")

    def end(self) -> None:
        """Call it when the restore has ended."""
        self.keeping.end()


def regions_from(record: records.HandedOff) -> list[HandoffRegion]:
    """What `KeptRestore.handed_off` recorded."""
    return [
        HandoffRegion(base_host_virt_addr=address, size=size, offset=offset, page_size=page_size)
        for address, size, offset, page_size in record.regions
    ]
