"""The guests that the daemon restores, from the request to their end.

Owns who may ask and how many, the task of each, and the figures of those that have ended. A restore belongs
to no connection: from the reply on the daemon itself has it. Must not know how a page is brought in.
"""

from __future__ import annotations

import errno
import signal
import socket
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Final, NoReturn

import structlog
import trio
from msgspec.structs import replace

from intercept_protocol import events
from intercept_protocol.addresses import PAGE_SIZE, GfnRange
from intercept_protocol.errors import WireError
from intercept_protocol.messages import (
    AddressSpaceKind,
    HypervisorKind,
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
from interceptd.memory.prefetch import prefetch
from interceptd.partition.factory import PartitionFactory
from interceptd.partition.keeping import Keeper
from interceptd.partition.kept_restore import KeptRestore, Request
from interceptd.partition.partition import Partition
from interceptd.partition.registry import PartitionRegistry
from interceptd.partition.restored_guest import Ending, HandedOver, RestoredGuest
from interceptd.scheduling.time_share import SHARE
from interceptd.sessions.handoff_listener import HandoffListener
from interceptd.sessions.restore_source import PageList, RestoreSource, examine, open_image
from interceptd.telemetry.event_bus import EventBus, PartitionPublisher
from interceptd.telemetry.trace import Trace

log = structlog.get_logger()

WORKERS: Final = 4
"""Threads of one restore that may wait for its image."""
RETRY_SECONDS: Final = 0.1
"""After which the rest of a guest is tried again, while the daemon ends."""
ENDED_LIMIT: Final = 64
"""Ended restores whose figures are still told."""


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
        self._event_bus = event_bus
        self._factory = factory
        self._partitions = partitions
        self._keeper = keeper
        self._event_bus = event_bus
        self._nursery: trio.Nursery | None = None
        self._living: dict[int, _Restore] = {}
        self._ended: dict[int, tuple[int, RestoreStatistics]] = {}
        """The uid of each, and its last figures."""
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
        restore = _Restore(
            left.call,
            left.name,
            left.partition_id,
            image_pages=left.image_pages,
            tenant=tenant,
            workers=workers,
            factory=self._factory,
            partitions=self._partitions,
            event_bus=PartitionPublisher(self._event_bus, left.partition_id),
        )
        restore.kept = left.kept
        restore.bring_back = left.bring_back
        restore.asked_by, restore.vmm = left.asked_by, left.vmm
        if left.listener is not None:
            restore.cookie = cookie_of(left.listener)
        self._living[left.partition_id] = restore

        async def opened() -> None:
            image = await open_image(left.image, workers, tenant.closer)
            source = RestoreSource(image, left.listener, left.prefetch, None, tenant.closer)
            restore.source = source
            restore.count_memory(source.memory_bytes)

        await self._live(restore, opened, left.connection)

    def remember(self, uid: int, partition_id: int, image_pages: int, error: str) -> None:
        """A predecessor's restore that has ended meanwhile."""
        self._ended[partition_id] = uid, _unserved(RestoreState.ENDED, image_pages, error)

    async def progress(self, call: RestoreProgress, asker: Peer) -> RestoreStatistics:
        """Raises ENOENT for an id that is none, or another uid's."""
        if call.partition_id not in self._living:
            await self.wait_returned()
        uid, figures = None, None
        if (living := self._living.get(call.partition_id)) is not None:
            uid, figures = living.tenant.uid, living.statistics()
        elif (ended := self._ended.get(call.partition_id)) is not None:
            uid, figures = ended
        if figures is None or uid != asker.uid:
            raise WireError(errno.ENOENT, f"no restore {call.partition_id}", partition_id=call.partition_id)
        return figures

    @staticmethod
    def _workers(tenant: Tenant) -> Workers:
        return Workers(WORKERS, f"image of uid {tenant.uid}", tenant.closer)

    async def _kept(
        self, call: Restore, name: str, asker: Connection, source: RestoreSource, workers: Workers
    ) -> _Restore:
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
        restore = _Restore(
            call,
            name,
            partition_id,
            image_pages=source.image.pages,
            tenant=tenant,
            workers=workers,
            factory=self._factory,
            partitions=self._partitions,
            event_bus=PartitionPublisher(self._event_bus, partition_id),
        )
        restore.source, restore.cookie = source, cookie
        self._living[partition_id] = restore
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
        restore: _Restore,
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

    def _remember(self, restore: _Restore) -> None:
        self.endings[restore.ending] += 1
        figures = replace(restore.statistics(), state=RestoreState.ENDED)
        self._ended[restore.partition_id] = restore.tenant.uid, figures
        if len(self._ended) > ENDED_LIMIT:
            del self._ended[next(iter(self._ended))]

    def _require_open(self) -> None:
        if self._partitions.closed:
            raise WireError(errno.ESHUTDOWN, "the daemon is draining and takes no more partitions")


class _Restore:
    """One restore: first it waits for a VMM, then it serves it."""

    def __init__(
        self,
        options: Restore,
        name: str,
        partition_id: int,
        *,
        image_pages: int,
        tenant: Tenant,
        workers: Workers,
        factory: PartitionFactory,
        partitions: PartitionRegistry,
        event_bus: PartitionPublisher,
    ) -> None:
        self._options = options
        self._name = name
        self.tenant = tenant
        self.partition_id = partition_id
        self.source: RestoreSource | None = None
        """None until a predecessor's image is open again."""
        self.kept: KeptRestore | None = None
        self.bring_back: Callable[[Partition, RestoredGuest], Awaitable[None]] | None = None
        """Of a predecessor's: see `Returning`."""
        self.reply = RestoreReply(partition_id=partition_id, image_pages=image_pages)
        self.vmm: HandedOver | None = None
        """Of a predecessor's: who has handed its memory over."""
        self.asked_by: Request | None = None
        """Of a predecessor's: the request that is perhaps not answered."""
        self._workers = workers
        self._factory = factory
        self._partitions = partitions
        self.cookie = 0
        """Of the socket that it was asked with."""
        self._memory_bytes = 0
        self._event_bus = event_bus
        self._asked_at = time.monotonic()
        self._ending = Ending.NOT_CLAIMED
        self._waiting = trio.CancelScope()
        self._guest: RestoredGuest | None = None
        self._error = ""
        """Why it waits, or was never served."""

    @property
    def state(self) -> RestoreState:
        if self._guest is not None:
            return self._guest.state
        return RestoreState.WAITING if self.vmm is None else RestoreState.SERVING

    @property
    def is_waiting(self) -> bool:
        return self.state is RestoreState.WAITING

    @property
    def ending(self) -> Ending:
        """What became of it, once it has ended."""
        return self._ending if self._guest is None else self._guest.ending

    def summary(self) -> PartitionSummary:
        """While it waits: as what an operator sees in the list of partitions."""
        return PartitionSummary(
            partition_id=self.partition_id, name=self._name, uid=self.tenant.uid, pid=0,
            address_space=AddressSpaceKind.IMAGE, hypervisor=HypervisorKind.USERFAULTFD, vps=0, regions=0,
            mapped_gfns=0, intercepts=0, invalidations=0,
            age_ms=int((time.monotonic() - self._asked_at) * 1000), memory_bytes=self._memory_bytes,
            restore=RestoreState.WAITING,
        )  # fmt: skip

    def statistics(self) -> RestoreStatistics:
        if self._guest is not None:
            return self._guest.statistics()
        pid = 0 if self.vmm is None else self.vmm.peer.pid
        return _unserved(self.state, self.reply.image_pages, self._error, pid)

    def stop_waiting(self) -> None:
        if self._guest is None:
            self._error, self._ending = "the daemon ended", Ending.DRAINED
            self._waiting.cancel()

    def count_memory(self, size: int) -> None:
        """What is kept of its files takes so many bytes of the uid's memory."""
        self.tenant.memory.change(size - self._memory_bytes)
        self._memory_bytes = size

    def end_kept(self) -> None:
        """No successor goes on with it."""
        if self.kept is not None:
            self.kept.end()

    async def run(
        self,
        open_source: Callable[[], Awaitable[None]] | None,
        connection: socket.socket | None,
    ) -> None:
        """From the request to the end, or from what a predecessor has left. Raises nothing of its own: that
        would end all others."""
        try:
            if open_source is not None:
                await open_source()
            assert self.source is not None, "now it is open"
            vmm = self.vmm or await self._wait(self.source, connection)
            if vmm is not None:
                await self._serve(vmm, self.source)
        except Exception as error:
            self._error = "the daemon failed"
            log.error("restore_failed", exc_info=error)  # noqa: TRY400 - as the session of another VMM does
        finally:
            if self.source is not None:
                self.source.close_listener()
                self.source.close()
            self._workers.close()

    async def _wait(self, source: RestoreSource, connection: socket.socket | None) -> HandedOver | None:
        """What a VMM has handed over; None if none has in time."""
        seconds, image = self._options.connect_timeout_ms / 1000, source.image
        assert source.listener is not None, "it is closed after a hand-off"
        self._workers.end_idle()
        log.info("restore_begun", name=self._name, image_pages=image.pages, timeout_s=seconds)
        self._event_bus.publish(
            events.RestoreBegun(
                name=self._name,
                uid=self.tenant.uid,
                image_pages=image.pages,
                timeout_ms=self._options.connect_timeout_ms,
            )
        )
        listener = HandoffListener(
            source.listener,
            image.pages * PAGE_SIZE,
            self.tenant,
            self._workers,
            refused=self._refused,
            kept=self.kept,
        )
        self._waiting.deadline = trio.current_time() + seconds
        with self._waiting:
            vmm = await listener.handed_over(connection)
            source.close_listener()
            return vmm
        if not self._partitions.closed:
            late = f"no VMM has handed over its memory within {seconds:g} s"
            self._error = f"{late}; {self._error}" if self._error else late
        log.warning("restore_not_claimed", error=self._error)
        self._event_bus.publish(events.RestoreNotClaimed(error=self._error[: events.ERROR_LENGTH]))
        return None

    async def _serve(self, vmm: HandedOver, source: RestoreSource) -> None:
        structlog.contextvars.bind_contextvars(**vmm.peer.named)
        try:
            partition = self._factory.restore(
                self._options,
                vmm,
                partition_id=self.partition_id,
                name=self._name,
                tenant=self.tenant,
                image=source.image,
                workers=self._workers,
                keeping=None if self.kept is None else self.kept.keeping,
            )
        except BaseException:
            self._ending = Ending.LEFT_FROZEN
            vmm.close()
            raise
        guest = self._guest = partition.restored
        assert guest is not None, "made to be restored"
        partition.before_end = partial(self._bring_in_the_rest, partition, guest)
        trace = None if source.ring is None else Trace(source.ring)
        partition.trace_into(trace)
        if self.bring_back is not None and self.kept is not None:
            partition.returns(self.kept.keeping.ledger.restarts)
        self._partitions.add(partition)
        try:
            await partition.run(partial(self._serve_guest, partition, guest, source))
        except WireError as error:  # it is lost, and has said so
            guest.error = guest.error or error.message
        finally:
            guest.end()
            partition.trace_into(None)
            self._partitions.remove(partition)

    async def _serve_guest(self, partition: Partition, guest: RestoredGuest, source: RestoreSource) -> None:
        if self.bring_back is None:
            for region in guest.regions:
                await partition.regions.add(region)
        else:
            await self.bring_back(partition, guest)
            guest.reader.wake_all()
        partition.start_reader(guest.reader)
        partition.start(guest.trim_workers)
        partition.start(partial(_bring_in, source.runs(), partition, guest))
        try:
            await guest.wait_vmm_ended()
        finally:
            guest.note_pages()

    async def _bring_in_the_rest(self, partition: Partition, guest: RestoredGuest) -> None:
        """So that the VMM can do without a daemon; in the time that a partition has for its end."""
        everything = [region.gfns for region in guest.regions]
        try:
            async with trio.open_nursery() as nursery:
                nursery.cancel_scope.deadline = trio.current_time() + partition.end_timeout()
                nursery.start_soon(_cancel_with, guest.wait_vmm_ended, nursery.cancel_scope)
                while not guest.vmm_gone:
                    await _bring_in(everything, partition, guest)
                    if await guest.reader.leave_to_kernel():
                        break
                    await trio.sleep(RETRY_SECONDS)
                nursery.cancel_scope.cancel()
        finally:
            guest.note_pages()

    def _refused(self, why: str, peer: Peer) -> None:
        self._error = f"a hand-off was refused: {why}"
        log.warning("handoff_refused", error=why, vmm_pid=peer.pid, vmm_uid=peer.uid)
        self._event_bus.publish(
            events.HandoffRefused(error=why[: events.ERROR_LENGTH], uid=peer.uid, pid=peer.pid)
        )


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


def _unserved(state: RestoreState, image_pages: int, error: str, pid: int = 0) -> RestoreStatistics:
    """The figures of a restore whose guest is not served, or not yet."""
    return RestoreStatistics(
        state=state, image_pages=image_pages, pages_in=0, demand_pages=0, around_pages=0, prefetched_pages=0,
        zero_pages=0, removed_pages=0, faults=0, retries=0, image_errors=0, pid=pid, error=error,
    )  # fmt: skip


async def _cancel_with(happening: Callable[[], Awaitable[None]], scope: trio.CancelScope) -> None:
    await happening()
    scope.cancel()


async def _bring_in(runs: Iterable[GfnRange], partition: Partition, guest: RestoredGuest) -> None:
    await prefetch(runs, partition.faults, partition.regions, guest.reader, guest.image_gfns)


async def _examined(
    handed: list[int], received: int, call: Restore, tenant: Tenant, workers: Workers, *, seconds: float
) -> RestoreSource:
    closer = tenant.closer
    handover = Handover(handed, partial(examine, received=received, call=call, closer=closer), closer)
    try:
        return await handover.made(seconds, workers)
    except Undecided as error:
        raise WireError(error.number, f"restore: {error}") from None
