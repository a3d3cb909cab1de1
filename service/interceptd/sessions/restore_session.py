"""One restore, from the request to its end: it waits for a VMM, serves its guest, and brings in the rest.

Owns the state of the restore, its figures, and what it does when the daemon drains. Must not know other
restores, limits, or how a page is brought in.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Awaitable, Callable, Iterable
from functools import partial
from typing import Final

import structlog
import trio

from intercept_protocol import events
from intercept_protocol.addresses import PAGE_SIZE, GfnRange
from intercept_protocol.errors import WireError
from intercept_protocol.messages import (
    AddressSpaceKind,
    HypervisorKind,
    PartitionSummary,
    Restore,
    RestoreReply,
    RestoreState,
    RestoreStatistics,
)
from interceptd.address_space.workers import Workers
from interceptd.connections.peer import Peer
from interceptd.connections.tenants import Tenant
from interceptd.memory.prefetch import prefetch
from interceptd.partition.factory import PartitionFactory
from interceptd.partition.handed_over import HandedOver
from interceptd.partition.kept_restore import KeptRestore, Request
from interceptd.partition.partition import Partition
from interceptd.partition.registry import PartitionRegistry
from interceptd.partition.restored_guest import Ending, RestoredGuest
from interceptd.sessions.handoff_listener import HandoffListener
from interceptd.sessions.restore_source import RestoreSource
from interceptd.telemetry.event_bus import PartitionPublisher
from interceptd.telemetry.trace import Trace

log = structlog.get_logger()

RETRY_SECONDS: Final = 0.1
"""After which the rest of a guest is tried again, while the daemon ends."""


class RestoreSession:
    """First it waits for a VMM, then it serves it. `run` is its whole life."""

    def __init__(
        self,
        options: Restore,
        name: str,
        reply: RestoreReply,
        *,
        tenant: Tenant,
        workers: Workers,
        factory: PartitionFactory,
        partitions: PartitionRegistry,
        event_bus: PartitionPublisher,
    ) -> None:
        self._options = options
        self._name = name
        self.tenant = tenant
        self.reply = reply
        self.partition_id = reply.partition_id
        self.source: RestoreSource | None = None
        """None until a predecessor's image is open again."""
        self.kept: KeptRestore | None = None
        self.bring_back: Callable[[Partition, RestoredGuest], Awaitable[None]] | None = None
        """Of a predecessor's: see `Returning`."""
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
        return unserved(self.state, self.reply.image_pages, self._error, pid)

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
        partition.start(guest.completion.watch)
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
                    if await guest.completion.leave_to_kernel():
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


def unserved(state: RestoreState, image_pages: int, error: str, pid: int = 0) -> RestoreStatistics:
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
