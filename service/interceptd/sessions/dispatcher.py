"""The way from an accepted socket to the session of its role.

Owns the connections of VMMs and operators; those of a partition's other roles are handed to the partition
(`attach`). Must not know what a session answers.
"""

from __future__ import annotations

import errno
import socket
from collections.abc import Awaitable, Callable
from contextlib import ExitStack

import structlog
import trio
from msgspec.structs import replace

from intercept_protocol import codec, messages, rpc
from intercept_protocol.errors import WireError
from intercept_protocol.messages import (
    AddressSpaceKind,
    CreatePartition,
    HelloReply,
    HelloVmm,
)
from interceptd.config.live import Settings
from interceptd.connections.connection import Connection
from interceptd.connections.hangup_watch import HangupWatch
from interceptd.connections.received_fds import KEPT_LIMIT, ReceivedFds
from interceptd.connections.request_loop import report_and_close, serve_calls
from interceptd.descriptor_reserve import is_used_up
from interceptd.hypervisor.software import DEPOSIT_PAGES
from interceptd.ledger.records import Created
from interceptd.log_share import charge_lines_to
from interceptd.memory_budget import MemoryBudget
from interceptd.partition.factory import PartitionFactory
from interceptd.partition.keeping import Keeper, Keeping
from interceptd.partition.partition import Partition
from interceptd.partition.registry import PartitionRegistry
from interceptd.scheduling.time_share import SHARE, TimeShares
from interceptd.sessions.attach import Attacher
from interceptd.sessions.event_stream import EventStream
from interceptd.sessions.handshake import Admission, Endpoint, Handshake, HelloRefused
from interceptd.sessions.operator import OperatorSession, Overview
from interceptd.sessions.restores import Restores
from interceptd.sessions.vmm import VmmSession
from interceptd.telemetry.event_bus import EventBus, Subscription


class Dispatcher:
    """One for both sockets. `hello_reply` makes the reply to every hello."""

    def __init__(
        self,
        settings: Settings,
        factory: PartitionFactory,
        partitions: PartitionRegistry,
        *,
        overview: Overview,
        hello_reply: Callable[[], HelloReply],
        event_bus: EventBus,
        turns: TimeShares,
        keeper: Keeper,
        memory: MemoryBudget,
    ) -> None:
        self._settings = settings
        self._factory = factory
        self._partitions = partitions
        self._overview = overview
        self.hello_reply = hello_reply
        self.event_bus = event_bus
        self._keeper = keeper
        self.admission = Admission(settings, event_bus, turns, memory)
        self._attacher = Attacher(settings, partitions, hello_reply)
        self.restores = Restores(settings, factory, partitions, keeper=keeper, event_bus=event_bus)
        """As is `watch`."""
        self.watch = HangupWatch()
        """Must run as long as connections are served."""
        self.operators = 0

    async def serve(self, endpoint: Endpoint, accepted: socket.socket) -> None:
        """Serve one connection, until it ends or a partition's nursery takes it over."""
        with ExitStack() as held:
            connection = Connection(accepted, self.admission.tenants, self.watch)
            SHARE.set(connection.tenant.time_share)
            charge_lines_to(connection.tenant.log_share)
            structlog.contextvars.bind_contextvars(**connection.peer.named)
            held.enter_context(report_and_close(connection, self.event_bus))
            try:
                handshake = await self.admission.admit(connection, endpoint)
                match handshake.hello:
                    case HelloVmm() as hello:
                        await self._serve_vmm(handshake, hello)
                    case messages.HelloOperator():
                        await self._serve_operator(handshake)
                    case hello:
                        with handshake.refusing():
                            self._attacher.attach(handshake, hello)
                        held.pop_all()  # the partition closes it now
            except HelloRefused as refusal:
                self.admission.count_refusal(connection, refusal.reason)
                raise

    @property
    def vmms(self) -> int:
        """VMM connections, with a partition or without."""
        return self.admission.tenants.vmms

    async def _serve_operator(self, handshake: Handshake) -> None:
        limit = self._settings.now.limits.operators
        with handshake.refusing():
            if self.operators >= limit:
                raise WireError(errno.ENOSPC, f"{limit} operators are connected", limit="operators")
        self.operators += 1
        charge_lines_to(None)
        try:
            descriptors = handshake.connection.keep_descriptors()
            await handshake.connection.answer(handshake.hello_reply(self.hello_reply()))
            await self._serve_calls(handshake.connection, descriptors)
        finally:
            self.operators -= 1

    async def _serve_calls(self, connection: Connection, descriptors: ReceivedFds) -> None:
        """Answer an operator, and send it the events that it subscribed to, until it leaves."""
        subscription = Subscription()
        session = OperatorSession(self._overview, self.event_bus, subscription, descriptors)
        stream = EventStream(connection, subscription)
        failure: Exception | None = None

        async def send(answer: bytes) -> None:
            await stream.send(answer)
            session.answered()

        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(stream.run)
                try:
                    await serve_calls(connection, messages.OPERATOR_METHODS, session.answer, send=send)
                except Exception as error:  # carried out of the nursery, which would wrap it in a group
                    failure = error
                nursery.cancel_scope.cancel()
        finally:
            session.close()
        if failure is not None:
            try:
                raise failure
            finally:
                del failure  # whose traceback leads back here: a cycle

    async def _serve_vmm(self, handshake: Handshake, hello: HelloVmm) -> None:
        """Serve a VMM that has no partition yet, and then the partition that it creates, to its end."""
        connection = handshake.connection
        with handshake.refusing():
            connection.tenant.vmms.acquire()
        connection.let_send_descriptors()
        connection.expect_long_requests()
        keeping: Keeping | None = None
        try:
            keeping = await self._keeper.open(connection, hello.name, handshake.msgid)
            reply = self.hello_reply()
            if keeping is None or keeping.journal.is_void:  # the store may have no room for this one
                reply = replace(reply, features={**reply.features, "kept": False})
            await connection.answer(handshake.hello_reply(reply))
            await self.serve_new_vmm(connection, hello.name, keeping)
        finally:
            if keeping is not None:
                keeping.end()
            connection.tenant.vmms.release()

    async def serve_new_vmm(
        self, connection: Connection, name: str, keeping: Keeping | None, lost: WireError | None = None
    ) -> None:
        """Serve a VMM that has no partition yet, and then the partition that it creates, to its end. `lost`
        says why its first request has no descriptors any more."""
        descriptors = connection.keep_descriptors()
        if lost is not None:
            descriptors.lose(lost)
        while (request := await connection.receive()) is not None:
            reply: messages.RestoreReply | messages.RestoreStatistics
            try:
                call = codec.decode_call(messages.VMM_METHODS, request.method, request.params)
                match call:
                    case messages.Restore():
                        reply = await connection.answer_watched(
                            self.restores.begin(call, name, connection, descriptors)
                        )
                    case messages.RestoreProgress():
                        reply = await connection.answer_watched(self.restores.progress(call, connection.peer))
                    case _:
                        partition = self._create_partition(call, name, connection, keeping)
                        break
            except WireError as error:
                connection.tenant.refused(request.method, error)
                answer = rpc.encode_error(request.msgid, error)
            else:
                answer = rpc.encode_result(request.msgid, codec.to_fields(reply))
            connection.drop_descriptors()
            await connection.answer(answer)
        else:
            return
        connection.drop_descriptors()
        if keeping is not None:
            keeping.created(partition.partition_id, partition.token, request.params)
        await self.live(partition, connection, owed=created(partition, request.msgid))

    def _create_partition(
        self, call: messages.VmmCall, name: str, connection: Connection, keeping: Keeping | None
    ) -> Partition:
        if not isinstance(call, CreatePartition):
            raise WireError(errno.ENOENT, f"{call.METHOD}: there is no partition yet, create_partition first")
        if self._partitions.closed:
            raise WireError(errno.ESHUTDOWN, "the daemon is draining and takes no more partitions")
        if call.address_space is AddressSpaceKind.PROCESS:
            connection.tenant.closer.require_room()
            if is_used_up():
                raise WireError(
                    errno.EMFILE, "the daemon has no descriptors left for the memory of another VMM"
                )
        with connection.tenant.partitions.acquired():
            partition = self._factory.create(call, name, connection, self._partitions.next_id(), keeping)
        self._partitions.add(partition)
        self._keeper.created(partition.partition_id)
        return partition

    def recreate(self, record: Created, name: str, connection: Connection, keeping: Keeping) -> Partition:
        """Create a predecessor's partition again, regardless of the limits; the caller restores its state.
        Raises `WireError` for a request that makes no sense."""
        request = codec.decode_fields(CreatePartition, CreatePartition.METHOD, [record.request])
        # The limit may be lower now, and the table takes more pages when it needs them.
        pages = DEPOSIT_PAGES if request.deposit_pages is None else request.deposit_pages
        most = self._settings.now.limits.deposit_pages_per_partition
        request = replace(request, deposit_pages=min(pages, most))
        partition = self._factory.create(request, name, connection, record.partition_id, keeping)
        partition.token = record.token
        partition.returns(keeping.ledger.restarts)
        connection.tenant.partitions.add(1)
        self._partitions.add(partition)
        return partition

    async def live(
        self,
        partition: Partition,
        connection: Connection,
        *,
        owed: bytes = b"",
        before: Callable[[ReceivedFds], Awaitable[bytes]] | None = None,
    ) -> None:
        """Run a partition to its end. `owed` is the answer that its VMM waits for. For a predecessor's
        partition, `before` brings its state back; it is called with the received descriptors, and returns
        what is owed."""
        live = partition.request.address_space is AddressSpaceKind.PROCESS
        descriptors = connection.keep_descriptors(KEPT_LIMIT if live else 0)

        async def serve() -> None:
            reply = owed if before is None else await before(descriptors)
            if reply:
                await connection.answer(reply)
            session = VmmSession(partition, descriptors)
            await serve_calls(connection, messages.VMM_METHODS, session.answer, journal=partition.journal)

        try:
            await partition.run(serve)
        finally:
            self._partitions.remove(partition)
            connection.tenant.partitions.release()


def created(partition: Partition, msgid: int) -> bytes:
    """The answer to `create_partition`."""
    credentials = messages.PartitionCredentials(partition_id=partition.partition_id, token=partition.token)
    return rpc.encode_result(msgid, codec.to_fields(credentials))
