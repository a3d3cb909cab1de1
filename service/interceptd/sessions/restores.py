"""The guests that the daemon restores, from the request to their end.

Owns who may ask and how many, the task of each, and the figures of those that have ended. A restore belongs
to no connection: it is the daemon's own from the reply on. Must not know how a guest is served
(`restore_session`).
"""

from __future__ import annotations

import errno
import signal
import socket
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Final, NoReturn

import structlog
import trio
from msgspec.structs import replace

from intercept_protocol.errors import WireError
from intercept_protocol.messages import (
    OnImageError,
    PartitionSummary,
    Restore,
    RestoreProgress,
    RestoreReply,
    RestoreState,
    RestoreStatistics,
)
from interceptd.address_space import Undecided
from interceptd.address_space.handover import Handover
from interceptd.address_space.workers import Workers
from interceptd.config.live import Settings
from interceptd.connections.connection import Connection
from interceptd.connections.peer import Peer
from interceptd.connections.received_fds import ReceivedFds
from interceptd.connections.socket_cookie import cookie_of
from interceptd.connections.tenants import Tenant
from interceptd.descriptor_reserve import is_used_up
from interceptd.log_share import charge_lines_to
from interceptd.partition.factory import PartitionFactory
from interceptd.partition.handed_over import HandedOver
from interceptd.partition.keeping import Keeper
from interceptd.partition.kept_restore import KeptRestore, Request
from interceptd.partition.partition import Partition
from interceptd.partition.registry import PartitionRegistry
from interceptd.partition.restored_guest import Ending, RestoredGuest
from interceptd.scheduling.time_share import SHARE
from interceptd.sessions.ended_restores import EndedRestores
from interceptd.sessions.restore_session import RestoreSession, unserved
from interceptd.sessions.restore_source import PageList, RestoreSource, examine, open_image
from interceptd.telemetry.event_bus import EventBus, PartitionPublisher

log = structlog.get_logger()

WORKERS: Final = 4
"""Threads of one restore that may wait for its image."""


@dataclass
class Returning:
    """What a predecessor left of a restore. `Restores.go_on` takes over the descriptors."""

    call: Restore
    name: str
    partition_id: int
    tenant: Tenant
    asked_by: Request | None
    kept: KeptRestore
    image: int
    image_pages: int
    prefetch: PageList | None
    listener: socket.socket | None
    """None once a VMM has handed its memory over."""
    connection: socket.socket | None
    """One that was accepted, and may bring a hand-off."""
    vmm: HandedOver | None
    bring_back: Callable[[Partition, RestoredGuest], Awaitable[None]]
    """Gives the partition the state that it had."""


class Restores:
    """Of a daemon. `run` must run as long as VMMs are served."""

    def __init__(
        self,
        settings: Settings,
        factory: PartitionFactory,
        partitions: PartitionRegistry,
        *,
        keeper: Keeper,
        event_bus: EventBus,
    ) -> None:
        self._settings = settings
        self._factory = factory
        self._partitions = partitions
        self._keeper = keeper
        self._event_bus = event_bus
        self._nursery: trio.Nursery | None = None
        self._living: dict[int, RestoreSession] = {}
        self._ended = EndedRestores()
        self.endings: Counter[Ending] = Counter()
        self.wait_returned: Callable[[], Awaitable[None]] = trio.lowlevel.checkpoint
        """Blocks until those of a predecessor are known."""

    async def run(self) -> NoReturn:
        """Serve restored guests until cancelled itself."""
        async with trio.open_nursery() as self._nursery:
            await trio.sleep_forever()
        raise AssertionError("it is only cancelled")

    def waiting(self) -> Iterator[PartitionSummary]:
        """Those that wait for their VMM, by ascending id."""
        return (each.summary() for _, each in sorted(self._living.items()) if each.is_waiting)

    def states(self) -> Counter[RestoreState]:
        """How many there are in each state."""
        return Counter(each.state for each in self._living.values())

    def drain(self) -> None:
        """End those that wait for their VMM; the others are partitions like any other."""
        for each in self._living.values():
            each.stop_waiting()

    async def begin(
        self, call: Restore, name: str, asker: Connection, descriptors: ReceivedFds
    ) -> RestoreReply:
        """Take over what came with the request, and wait for a VMM from now on. Raises `WireError`."""
        tenant = asker.tenant
        self._require_open()
        tenant.closer.require_room()
        if is_used_up():
            raise WireError(errno.EMFILE, "restore: the daemon has no descriptors left for another guest")
        if call.on_image_error is OnImageError.KILL:
            _require_kill(asker)
        with tenant.vmms.acquired(), tenant.partitions.acquired():
            received, handed = descriptors.received, descriptors.take()
            workers = self._workers(tenant)
            try:
                seconds = self._settings.now.timeouts.invalidate_ms / 1000
                source = await _examined(handed, received, call, tenant, workers, seconds=seconds)
            except BaseException:
                workers.close()
                raise
            try:
                restore = await self._kept(call, name, asker, source, workers)
            except BaseException:
                source.close()
                workers.close()
                raise
            assert self._nursery is not None, "it runs as long as VMMs are served"
            self._nursery.start_soon(self._live, restore)
            return restore.reply

    async def owed_to(self, asker: Request) -> RestoreReply | None:
        """The answer to a request that a predecessor carried out; None if it did not."""
        await self.wait_returned()
        return next((each.reply for each in self._living.values() if each.asked_by == asker), None)

    async def go_on(self, left: Returning) -> None:
        """Serve what a predecessor has left, to its end, whatever the limits are now. Raises nothing, as
        `begin` does not once it has answered."""
        tenant = left.tenant
        tenant.vmms.add(1)
        tenant.partitions.add(1)
        workers = self._workers(tenant)
        reply = RestoreReply(partition_id=left.partition_id, image_pages=left.image_pages)
        restore = self._session(left.call, left.name, reply, tenant, workers)
        restore.kept = left.kept
        restore.bring_back = left.bring_back
        restore.asked_by, restore.vmm = left.asked_by, left.vmm
        if left.listener is not None:
            restore.cookie = cookie_of(left.listener)

        async def opened() -> None:
            image = await open_image(left.image, workers, tenant.closer)
            source = RestoreSource(image, left.listener, left.prefetch, None, tenant.closer)
            restore.source = source
            restore.count_memory(source.memory_bytes)

        await self._live(restore, opened, left.connection)

    def publisher(self, partition_id: int) -> PartitionPublisher:
        """Of the events of one restore."""
        return PartitionPublisher(self._event_bus, partition_id)

    def remember(
        self, uid: int, partition_id: int, image_pages: int, ending: Ending, error: str = ""
    ) -> None:
        """A predecessor's restore that has ended meanwhile, or cannot go on."""
        self.endings[ending] += 1
        self._ended.add(partition_id, uid, unserved(RestoreState.ENDED, image_pages, error))

    async def progress(self, call: RestoreProgress, asker: Peer) -> RestoreStatistics:
        """Raises ENOENT for an id that is none, or another uid's."""
        if call.partition_id not in self._living:
            await self.wait_returned()
        uid, figures = None, None
        if (living := self._living.get(call.partition_id)) is not None:
            uid, figures = living.tenant.uid, living.statistics()
        elif (ended := self._ended.find(call.partition_id)) is not None:
            uid, figures = ended
        if figures is None or uid != asker.uid:
            raise WireError(errno.ENOENT, f"no restore {call.partition_id}", partition_id=call.partition_id)
        return figures

    def _session(
        self, call: Restore, name: str, reply: RestoreReply, tenant: Tenant, workers: Workers
    ) -> RestoreSession:
        """One that is known by its id from now on."""
        session = RestoreSession(
            call,
            name,
            reply,
            tenant=tenant,
            workers=workers,
            factory=self._factory,
            partitions=self._partitions,
            event_bus=self.publisher(reply.partition_id),
        )
        self._living[reply.partition_id] = session
        return session

    @staticmethod
    def _workers(tenant: Tenant) -> Workers:
        return Workers(WORKERS, f"image of uid {tenant.uid}", tenant.closer)

    async def _kept(
        self, call: Restore, name: str, asker: Connection, source: RestoreSource, workers: Workers
    ) -> RestoreSession:
        """A restore that outlives the daemon from now on."""
        tenant = asker.tenant
        self._require_open()  # a drain may have begun meanwhile
        prefetch, listener = source.prefetch, source.listener
        assert listener is not None, "it came with the request"
        if not tenant.memory.has_room(source.memory_bytes):
            raise tenant.memory.refusal()
        cookie = cookie_of(listener)
        for other in self._living.values():
            if other.cookie == cookie:
                raise WireError(
                    errno.EBUSY, f"restore: listener: restore {other.partition_id} has it", field="listener"
                )
        partition_id = self._partitions.reserve_id()
        self._keeper.created(partition_id)
        reply = RestoreReply(partition_id=partition_id, image_pages=source.image.pages)
        restore = self._session(call, name, reply, tenant, workers)
        restore.source, restore.cookie = source, cookie
        try:
            restore.kept = await KeptRestore.begin(
                self._keeper,
                tenant,
                listener,
                source.image.fileno(),
                None if prefetch is None else prefetch.descriptor,
            )
            self._require_open()
        except BaseException:
            del self._living[partition_id]
            restore.end_kept()
            raise
        restore.count_memory(source.memory_bytes)
        if restore.kept is not None:
            request = None if asker.inbox is None else (asker.cookie, asker.inbox.take_serial())
            restore.kept.requested(request, tenant, restore.reply, name, call)
        return restore

    async def _live(
        self,
        restore: RestoreSession,
        open_source: Callable[[], Awaitable[None]] | None = None,
        connection: socket.socket | None = None,
    ) -> None:
        tenant = restore.tenant
        SHARE.set(tenant.time_share)
        charge_lines_to(tenant.log_share)
        structlog.contextvars.unbind_contextvars("pid", "pid_namespace")  # of who asked
        structlog.contextvars.bind_contextvars(uid=tenant.uid, partition_id=restore.partition_id)
        try:
            await restore.run(open_source, connection)
        finally:
            del self._living[restore.partition_id]
            self._remember(restore)
            restore.count_memory(0)
            restore.end_kept()
            tenant.partitions.release()
            tenant.vmms.release()

    def _remember(self, restore: RestoreSession) -> None:
        self.endings[restore.ending] += 1
        figures = replace(restore.statistics(), state=RestoreState.ENDED)
        self._ended.add(restore.partition_id, restore.tenant.uid, figures)

    def _require_open(self) -> None:
        if self._partitions.closed:
            raise WireError(errno.ESHUTDOWN, "the daemon is draining and takes no more partitions")


def _require_kill(asker: Connection) -> None:
    """Raises EPERM unless the daemon may kill what runs as the asker's user."""
    pidfd = asker.peer_pidfd()
    if pidfd is None:  # it has exited, or the kernel is older than any userfaultfd that can be served
        return
    try:
        signal.pidfd_send_signal(pidfd.fileno(), 0)
    except PermissionError:
        raise WireError(
            errno.EPERM,
            f"restore: on_image_error: the daemon may not kill a process of uid {asker.peer.uid}",
            field="on_image_error",
        ) from None
    except ProcessLookupError:
        pass
    finally:
        pidfd.close()


async def _examined(
    handed: list[int], received: int, call: Restore, tenant: Tenant, workers: Workers, *, seconds: float
) -> RestoreSource:
    closer = tenant.closer
    handover = Handover(handed, partial(examine, received=received, call=call, closer=closer), closer)
    try:
        return await handover.made(seconds, workers)
    except Undecided as error:
        raise WireError(error.number, f"restore: {error}") from None
