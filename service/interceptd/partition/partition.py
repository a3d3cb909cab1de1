"""A partition: one guest, everything held for it, and the nursery that its tasks live in.

Owns the lifetimes: the region manager, the notifier connections and the VPs end with the partition, and the
partition ends with its VMM's connection, in order. Must not know how a client gets in.
"""

from __future__ import annotations

import errno
import hmac
import secrets
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

import structlog
import trio

from intercept_protocol import events, messages
from intercept_protocol.errors import WireError
from intercept_protocol.messages import CreatePartition
from intercept_protocol.outcomes import Answer, Outcome
from intercept_protocol.text import sentence
from interceptd.address_space import AddressSpace
from interceptd.address_space.declared import DeclaredAddressSpace
from interceptd.address_space.image import ImageAddressSpace
from interceptd.address_space.process import ProcessAddressSpace
from interceptd.connections.connection import Connection
from interceptd.connections.peer import Peer
from interceptd.connections.request_loop import CallsInFlight, report_and_close
from interceptd.connections.tenants import Tenant
from interceptd.errors import PartitionLost
from interceptd.hypervisor import Hypervisor
from interceptd.hypervisor.remote import RemoteHypervisor
from interceptd.hypervisor.slat import SoftwareSlat
from interceptd.ledger.journal import Journal
from interceptd.memory.fault_handler import FaultHandler
from interceptd.memory.region_manager import RegionManager
from interceptd.memory_budget import CacheShare, Cost
from interceptd.mmu_notifier import MmuNotifier
from interceptd.partition.fault_reader import FaultReader
from interceptd.partition.keeping import Hello, Keeping
from interceptd.partition.restored_guest import RestoredGuest
from interceptd.partition.virtual_processor import VirtualProcessor
from interceptd.scheduling.time_share import give_way
from interceptd.telemetry.counters import PortCalls, RestoreCounts, Totals
from interceptd.telemetry.event_bus import PartitionPublisher
from interceptd.telemetry.histogram import InterceptLatency
from interceptd.telemetry.trace import Trace

log = structlog.get_logger()

Memory = DeclaredAddressSpace | ProcessAddressSpace | ImageAddressSpace
LAST_ANSWERS_SECONDS = 1.0
"""How long VPs that wait have to be told that the partition is lost."""
VMM_LEAVES_SECONDS = 0.5
"""A process that exits closes its connections one by one: within this it is an exit, beyond it the loss of
the hypervisor connection."""


@dataclass(eq=False)
class Partition:
    """See the module. Everything is built before the nursery opens; `run` is the partition's life."""

    partition_id: int
    name: str
    owner: Peer
    tenant: Tenant
    request: CreatePartition
    address_space: AddressSpace
    memory: Memory
    """The address space itself, for the VMM's calls that concern it; `address_space` may be a wrapper."""
    hypervisor: Hypervisor
    table: SoftwareSlat
    """What the hypervisor has mapped."""
    link: RemoteHypervisor | None
    """The hypervisor itself, where it is the VMM's."""
    notifier: MmuNotifier
    regions: RegionManager
    faults: FaultHandler
    event_bus: PartitionPublisher
    end_timeout: Callable[[], float]
    restored: RestoredGuest | None = None
    """Of a guest whose memory comes from an image."""
    before_end: Callable[[], Awaitable[None]] | None = None
    """What is done, while the daemon still serves, for a VMM that lives on."""
    keeping: Keeping | None = None
    """How a successor of the daemon gets it."""
    caches: Sequence[CacheShare] = ()
    """What is remembered of its VMM's memory."""
    restarts: int = 0
    """How many daemons have taken it over."""
    port_calls: PortCalls = field(default_factory=PortCalls)
    """What `hypervisor` measures, if it does."""
    token: bytes = field(default_factory=lambda: secrets.token_bytes(16), repr=False)
    created_at: float = field(default_factory=time.monotonic)
    vps: dict[int, VirtualProcessor | FaultReader] = field(default_factory=dict)
    returning: set[int] = field(default_factory=set)
    """Indices of VPs that a predecessor had and that are not served yet; each starts with a kept kick."""
    notifiers: int = 0
    announcements: CallsInFlight = field(default_factory=CallsInFlight)
    """What notifier connections asked and were not answered yet."""
    answers: Counter[Answer] = field(default_factory=Counter)
    ending: bool = False
    lost: bool = False

    def __post_init__(self) -> None:
        self._nursery: trio.Nursery | None = None
        self._serving = trio.CancelScope()
        self._joined: dict[_Joined, None] = {}
        self._is_losing = False
        self._vmm_left = trio.Event()
        self._is_back = trio.Event()
        """Unless it `returns`: what a predecessor has left unfinished was taken from the guest."""
        self._is_back.set()
        self._left_latency = InterceptLatency()

    @property
    def journal(self) -> Journal | None:
        return None if self.keeping is None else self.keeping.journal

    def admits(self, token: bytes, peer: Peer) -> bool:
        """Whether a connection with this token, of this peer, may join. The token's time is constant."""
        return hmac.compare_digest(token, self.token) and peer.uid == self.owner.uid and not self.ending

    async def run(self, serve_vmm: Callable[[], Awaitable[None]]) -> None:
        """Serve the VMM until it leaves or `end` is called, then end in order.

        Raises what serving the VMM raised, after the end; EIO if a mapping could not be taken away.
        """
        structlog.contextvars.bind_contextvars(partition_id=self.partition_id)
        if not self.restarts:
            self._tell_created()
        failure: Exception | None = None
        try:
            async with trio.open_nursery() as self._nursery:
                self._nursery.start_soon(self._telling_vps, self.regions.run)
                self._nursery.start_soon(self._end_with_memory)
                try:
                    with self._serving:
                        await self._telling_vps(serve_vmm)
                except Exception as error:
                    if isinstance(error, PartitionLost):
                        raise
                    failure = error
                self._vmm_left.set()
                if self._serving.cancelled_caught and self.before_end is not None:
                    await self.before_end()
                await self._end()
                await self._end_joined()
                self._nursery.cancel_scope.cancel()
        except* PartitionLost as lost:
            self.lost = True
            why = sentence(lost)
            log.critical("partition_lost", error=why)
            self.event_bus.publish(events.PartitionLost(error=why[: events.ERROR_LENGTH]))
            failure = WireError(errno.EIO, f"the partition is lost: {why}")
        finally:
            self.ending = True
            if self.keeping is not None:
                await self.keeping.let_go()
            self.memory.close()
            self.faults.close()
            self.notifier.discard()
            await self.memory.discard()
            await self.regions.discard()
            await self.hypervisor.discard()
            log.info("partition_ended", intercepts=self.answers.total())
            self.event_bus.publish(events.PartitionEnded(intercepts=self.answers.total()))
        if failure is not None:
            try:
                raise failure
            finally:
                del failure  # whose traceback leads back here: a cycle

    def end(self) -> None:
        """Begin the partition's end; `run` returns when it is over."""
        self._serving.cancel()

    def start_vp(
        self,
        vp: VirtualProcessor,
        connection: Connection,
        owed: bytes,
        hello: Hello | None = None,
        *,
        before: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        """Run a VP as a task of this partition, once `before` has returned. Raises ENOSPC if its uid has too
        many, unless a predecessor had it.

        Here and below, `owed` is the answer that the peer waits for: to its `hello`, which is None if a
        predecessor has kept the connection.
        """

        async def leave() -> None:
            del self.vps[vp.index]
            self.tenant.vps.release()
            self._left_latency.add(vp.latency)
            self.event_bus.publish(events.VpDetached(vp_index=vp.index, intercepts=vp.intercepts))

        if hello is None:
            self.tenant.vps.add(1)
        else:
            self.tenant.vps.acquire()
        self.vps[vp.index] = vp
        self.event_bus.publish(events.VpAttached(vp_index=vp.index))

        async def serve() -> None:
            if before is not None:
                await before()
            await vp.run()

        self._spawn(connection, owed, hello, serve, leave, vp_index=vp.index)

    def start_notifier(
        self,
        connection: Connection,
        owed: bytes,
        serve: Callable[[], Awaitable[None]],
        close: Callable[[], Awaitable[None]],
        hello: Hello | None = None,
    ) -> None:
        """Run a notifier connection as a task of this partition; `close` is called when it ends."""

        async def leave() -> None:
            self.notifiers -= 1
            await close()

        self.notifiers += 1
        self._spawn(connection, owed, hello, serve, leave)

    def start_reader(self, reader: FaultReader) -> None:
        """Have the faults of a restored guest served by a task of this partition; views show it as a VP."""
        self.vps[reader.index] = reader
        self.start(reader.run)

    def start(self, task: Callable[[], Awaitable[None]]) -> None:
        """Run a task that lives as long as the partition and may lose it (`PartitionLost`)."""
        assert self._nursery is not None, "only a partition that runs"
        self._nursery.start_soon(self._telling_vps, task)

    def start_link(
        self, link: RemoteHypervisor, connection: Connection, owed: bytes, hello: Hello | None = None
    ) -> None:
        """Run the hypervisor connection as a task of this partition, which is lost with it."""

        async def serve() -> None:
            with report_and_close(connection, self.event_bus):
                await link.serve(connection)
            with trio.move_on_after(VMM_LEAVES_SECONDS):
                await self._vmm_left.wait()
            if not self._vmm_left.is_set():
                raise PartitionLost("the hypervisor connection closed")

        async def leave() -> None:
            link.claimed = False  # for another, if this one left before it was welcomed

        link.claimed = True
        self._spawn(connection, owed, hello, serve, leave)

    def returns(self, restarts: int) -> None:
        """A predecessor had it: who joins is not welcomed before it `is_back`."""
        self.restarts = restarts
        self._is_back = trio.Event()

    def is_back(self) -> None:
        """Welcome those who have joined meanwhile, and from now on."""
        self._is_back.set()

    def kick(self, vp_index: int) -> bool:
        """Kick one VP; False if there is no such VP."""
        vp = self.vps.get(vp_index)
        if vp is not None:
            vp.kick()
        return vp is not None or vp_index in self.returning

    async def kick_all(self) -> None:
        for vp in list(self.vps.values()):
            vp.kick()
            await give_way()

    async def drain_vps(self) -> None:
        for vp in list(self.vps.values()):
            vp.drain()
            await give_way()

    def memory_bytes(self) -> int:
        """What it takes of the memory budget, with its connections; work of a constant length."""
        connections = 1 + len(self.vps) + self.notifiers + (self.link is not None and self.link.connected)
        return (
            Cost.VMM
            + Cost.PARTITION
            + Cost.CONNECTION * connections
            + Cost.VP * len(self.vps)
            + Cost.REGION * self.regions.region_count
            + Cost.MAPPING * self.regions.mapping_count
            + Cost.VMA * self.address_space.vma_count
            + Cost.OPEN_INVALIDATION * self.notifier.open_invalidations
            + sum(cache.held for cache in self.caches)
        )

    @property
    def trace(self) -> Trace | None:
        """What an operator records of it."""
        return self.event_bus.trace

    def trace_into(self, trace: Trace | None) -> None:
        """Write what happens into `trace` from now on; None for nothing any more."""
        self.event_bus.trace = self.table.trace = self.notifier.trace = self.regions.trace = trace
        if isinstance(self.memory, DeclaredAddressSpace):
            self.memory.trace = trace
        else:
            self.faults.trace = trace

    def latency(self) -> InterceptLatency:
        """Of the intercepts of all VPs that are or were."""
        whole = InterceptLatency()
        for latency in (self._left_latency, *(vp.latency for vp in self.vps.values())):
            whole.add(latency)
        return whole

    def totals(self) -> Totals:
        """All that was counted so far, in counters of the partition's own where they go on counting."""
        counters = self.hypervisor.counters()
        return Totals(
            answers=self.answers,
            intercepts=self.latency(),
            stages=self.faults.stages,
            port_calls=self.port_calls,
            invalidations=self.notifier.by_source,
            passes=self.notifier.passes,
            stale_attempts=self.notifier.stale_windows,
            split_large_pages=self.faults.split_large_pages,
            map_calls=counters.map_calls,
            unmap_calls=counters.unmap_calls,
            deposits=counters.deposits,
            restore=RestoreCounts() if self.restored is None else self.restored.counts(),
        )

    def statistics(self) -> messages.PartitionStatistics:
        counters, latency = self.hypervisor.counters(), self.latency()
        return messages.PartitionStatistics(
            regions=self.regions.region_count,
            vmas=self.address_space.vma_count,
            vps=len(self.vps),
            open_invalidations=self.notifier.open_invalidations,
            mapped_gfns=counters.mapped_gfns,
            no_access_gfns=counters.no_access_gfns,
            slat_extents=counters.slat_extents,
            map_calls=counters.map_calls,
            unmap_calls=counters.unmap_calls,
            deposits=counters.deposits,
            invalidations=self.notifier.invalidations,
            stale_attempts=self.notifier.stale_windows,
            split_large_pages=self.faults.split_large_pages,
            restarts=self.restarts,
            intercepts=by_outcome(self.answers),
            unresolved={cause.word: count for cause, count in self.memory.unresolved.items()},
            latency=latency.all.buckets,
            latency_waited=latency.waited.buckets,
            restore=None if self.restored is None else self.restored.statistics(),
        )

    def _spawn(
        self,
        connection: Connection,
        owed: bytes,
        hello: Hello | None,
        serve: Callable[[], Awaitable[None]],
        leave: Callable[[], Awaitable[None]],
        **context: int,
    ) -> None:
        """Own a connection that joins: greet it, serve it, close it; nothing of it reaches the others."""
        joined = _Joined()

        async def live() -> None:
            structlog.contextvars.bind_contextvars(partition_id=self.partition_id, **context)
            try:
                with joined.scope, report_and_close(connection, self.event_bus):
                    if hello is not None:
                        await self._is_back.wait()
                        if self.keeping is not None:
                            await self.keeping.join(connection, hello)
                    if owed:
                        await connection.send(owed)
                        connection.mark_answered(put_off=hello is None)
                    await self._telling_vps(serve, joined)
            finally:
                await leave()
                if self.keeping is not None and not self.ending:
                    self.keeping.leave(connection)
                del self._joined[joined]
                joined.left.set()

        assert self._nursery is not None, "only a partition that runs is found"
        self._joined[joined] = None
        self._nursery.start_soon(live)

    def _tell_created(self) -> None:
        log.info("partition_created", name=self.name)
        self.event_bus.publish(
            events.PartitionCreated(
                name=self.name,
                uid=self.owner.uid,
                pid=self.owner.pid,
                address_space=self.request.address_space,
                hypervisor=self.request.hypervisor,
            )
        )

    async def _telling_vps(self, task: Callable[[], Awaitable[None]], joined: _Joined | None = None) -> None:
        """If the task loses the partition, no VP is left without its answer when all tasks are cancelled."""
        try:
            await task()
        except PartitionLost:
            if self._is_losing:  # another task has noticed, and ends this one
                await trio.sleep_forever()
            self._is_losing = self.ending = True
            with trio.CancelScope(shield=True), trio.move_on_after(LAST_ANSWERS_SECONDS):
                for vp in list(self.vps.values()):
                    vp.fail()
                    await give_way()
                for vp in list(self.vps.values()):
                    await vp.wait_quiet()
                await self._end_joined(besides=joined)
            raise

    async def _end_with_memory(self) -> None:
        await self.memory.run()
        log.warning("memory_gone")
        self.end()

    async def _end(self) -> None:
        """Take no more intercepts, answer those in flight, drain the notifier, unmap; the caller closes."""
        self.ending = True
        await self.drain_vps()
        with trio.move_on_after(timeout := self.end_timeout()) as scope:
            for vp in list(self.vps.values()):
                await vp.wait_quiet()
        if scope.cancelled_caught:
            log.warning("partition_end_cut_short", timeout_s=timeout)
        try:
            await self.regions.serve_pending()
            await self.regions.close()
            with trio.move_on_after(self.end_timeout()):  # what was served is acknowledged, if it is read
                await self.announcements.wait_answered()
        except PartitionLost as error:  # a VMM that is gone, or is told by the end of its connection
            log.warning("mappings_left", error=str(error))

    async def _end_joined(self, *, besides: _Joined | None = None) -> None:
        """End what joined, one after the other: ended at once, hundreds would take one round of the loop."""
        for joined in list(self._joined):
            if joined is not besides:
                joined.scope.cancel()
                await joined.left.wait()


@dataclass(eq=False)
class _Joined:
    """A connection that joined: what ends it, and when it has left."""

    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    left: trio.Event = field(default_factory=trio.Event)


def by_outcome(answers: Counter[Answer]) -> dict[str, dict[str, int]]:
    """Counts as {outcome: {reason: n}}, with every answer that there is."""
    table: dict[str, dict[str, int]] = {outcome.value: {} for outcome in Outcome}
    for answer in Answer:
        table[answer.outcome][answer.reason] = answers[answer]
    return table
