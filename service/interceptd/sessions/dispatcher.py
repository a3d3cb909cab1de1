"""The way from an accepted socket to the session of its role.

Owns the connections of VMMs and operators; those of a partition's other roles are handed to the partition
(`attach`). Must not know what a session answers.
"""

from __future__ import annotations

import errno
import socket
from collections.abc import Callable
from contextlib import ExitStack

import trio

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
from interceptd.connections.received_fds import ReceivedFds
from interceptd.connections.request_loop import report_and_close, serve_calls
from interceptd.log_share import charge_lines_to
from interceptd.partition.factory import PartitionFactory
from interceptd.partition.partition import Partition
from interceptd.partition.registry import PartitionRegistry
from interceptd.scheduling.time_share import SHARE, TimeShares
from interceptd.sessions.attach import Attacher
from interceptd.sessions.event_stream import EventStream
from interceptd.sessions.handshake import Admission, Endpoint, Handshake, HelloRefused
from interceptd.sessions.operator import OperatorSession, Overview
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
    ) -> None:
        self._settings = settings
        self._factory = factory
        self._partitions = partitions
        self._overview = overview
        self._hello_reply = hello_reply
        self._event_bus = event_bus
        self.admission = Admission(settings, event_bus, turns)
        self._attacher = Attacher(settings, partitions, hello_reply)
        self.watch = HangupWatch()
        """Must run as long as connections are served."""
        self.operators = 0

    async def serve(self, endpoint: Endpoint, accepted: socket.socket) -> None:
        """Serve one connection, until it ends or a partition's nursery takes it over."""
        with ExitStack() as held:
            connection = Connection(accepted, self.admission.tenants, self.watch)
            SHARE.set(connection.tenant.time_share)
            charge_lines_to(connection.tenant.log_share)
            held.enter_context(report_and_close(connection, self._event_bus))
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
            await handshake.connection.answer(handshake.hello_reply(self._hello_reply()))
            await self._serve_calls(handshake.connection)
        finally:
            self.operators -= 1

    async def _serve_calls(self, connection: Connection) -> None:
        """Answer an operator, and send it the events that it subscribed to, until it leaves."""
        subscription = Subscription()
        session = OperatorSession(self._overview, self._event_bus, subscription)
        stream = EventStream(connection, subscription)
        failure: Exception | None = None
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(stream.run)
                try:
                    await serve_calls(connection, messages.OPERATOR_METHODS, session.answer, send=stream.send)
                except Exception as error:  # carried out of the nursery, which would wrap it in a group
                    failure = error
                nursery.cancel_scope.cancel()
        finally:
            self._event_bus.unsubscribe(subscription)
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
        try:
            await connection.answer(handshake.hello_reply(self._hello_reply()))
            while (request := await connection.receive()) is not None:
                connection.drop_descriptors()  # nothing takes any before there is a partition
                try:
                    call = codec.decode_call(messages.VMM_METHODS, request.method, request.params)
                    partition = self._create_partition(call, hello.name, connection)
                except WireError as error:
                    await connection.answer(rpc.encode_error(request.msgid, error))
                    continue
                await self._live(partition, connection, request.msgid)
                return
        finally:
            connection.tenant.vmms.release()

    def _create_partition(self, call: messages.VmmCall, name: str, connection: Connection) -> Partition:
        if not isinstance(call, CreatePartition):
            raise WireError(errno.ENOENT, f"{call.METHOD}: there is no partition yet, create_partition first")
        if self._partitions.closed:
            raise WireError(errno.ESHUTDOWN, "the daemon is draining and takes no more partitions")
        if call.address_space is AddressSpaceKind.PROCESS:
            connection.tenant.closer.require_room()
        with connection.tenant.partitions.acquired():
            partition = self._factory.create(call, name, connection, self._partitions.next_id())
        self._partitions.add(partition)
        return partition

    async def _live(self, partition: Partition, connection: Connection, msgid: int) -> None:
        created = messages.PartitionCredentials(partition_id=partition.partition_id, token=partition.token)
        live = partition.request.address_space is AddressSpaceKind.PROCESS
        descriptors = connection.keep_descriptors() if live else ReceivedFds(connection.tenant.closer)

        async def serve() -> None:
            await connection.answer(rpc.encode_result(msgid, codec.to_fields(created)))
            await serve_calls(connection, messages.VMM_METHODS, VmmSession(partition, descriptors).answer)

        try:
            await partition.run(serve)
        finally:
            self._partitions.remove(partition)
            connection.tenant.partitions.release()
