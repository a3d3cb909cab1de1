"""The way from an accepted socket to the session of its role.

Owns admission: the limits of each role, and who owns a connection when. A VMM's or an operator's is served
here, a VP's or a notifier's is handed to its partition's nursery. Must not know what a session answers.
"""

from __future__ import annotations

import errno
import socket
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial

import trio

from intercept_protocol import codec, messages, rpc
from intercept_protocol.errors import ProtocolViolation, WireError
from intercept_protocol.messages import (
    AddressSpaceKind,
    CreatePartition,
    HelloReply,
    HelloVmm,
    PartitionHello,
)
from interceptd.calls import closing, serve_calls
from interceptd.config import Limits
from interceptd.connection import Connection
from interceptd.descriptor_box import DescriptorBox
from interceptd.event_stream import EventStream
from interceptd.hello import Door, HelloRefused, Visitor, admit
from interceptd.journal import Journal, Subscription
from interceptd.notifier_session import NotifierSession
from interceptd.operator_session import OperatorSession, Overview
from interceptd.partition import Partition
from interceptd.partition_factory import PartitionFactory
from interceptd.registry import PartitionRegistry
from interceptd.settings import Settings
from interceptd.tenants import Tenants
from interceptd.virtual_processor import VirtualProcessor
from interceptd.vmm_session import VmmSession

LEFT = "left"
"""A peer that was gone before its hello was complete."""
REFUSAL_NUMBERS = (
    errno.EACCES, errno.EAGAIN, errno.EBADMSG, errno.EEXIST, errno.EINVAL, errno.EMSGSIZE, errno.ENOSPC,
    errno.EPROTO, errno.EPROTONOSUPPORT, errno.ETIMEDOUT,
)  # fmt: skip
"""What a hello may be answered with (protocol, section 9)."""


class Reception:
    """One for all doors. `hello_reply` gives what everyone is told."""

    def __init__(
        self,
        settings: Settings,
        factory: PartitionFactory,
        partitions: PartitionRegistry,
        *,
        overview: Overview,
        hello_reply: Callable[[], HelloReply],
        journal: Journal,
    ) -> None:
        self._settings = settings
        self._factory = factory
        self._partitions = partitions
        self._overview = overview
        self._hello_reply = hello_reply
        self._journal = journal
        self._tenants = Tenants(lambda: self._limits.control_requests_per_second)
        self._queues: Counter[tuple[Door, int]] = Counter()  # connections without hello
        self.operators = 0
        self.refusals: Counter[str] = Counter()
        """Connections that got no welcome, by the error that they were told; `LEFT` is of those that left."""
        self._vmms: Counter[int] = Counter()  # by uid

    async def enter(self, door: Door, stream: trio.SocketStream) -> None:
        """Serve one accepted connection, until it ends or a partition's nursery takes it over."""
        with ExitStack() as held:
            connection = Connection(socket.socket(fileno=stream.socket.detach()), self._tenants)
            held.enter_context(closing(connection, self._journal))
            try:
                visitor = await self._admit(connection, door)
                match visitor.hello:
                    case HelloVmm() as hello:
                        await self._serve_vmm(visitor, hello)
                    case messages.HelloOperator():
                        await self._serve_operator(visitor)
                    case hello:
                        with visitor.refusing():
                            self._join(visitor, hello)
                        held.pop_all()  # the partition closes it now
            except HelloRefused as refusal:
                self.refusals[refusal.reason] += 1
                raise

    @property
    def _limits(self) -> Limits:
        return self._settings.now.limits

    @property
    def connections(self) -> int:
        """Of all uids, in any state and any role."""
        return self._tenants.connections

    @property
    def vmms(self) -> int:
        """VMM connections, with a partition or without."""
        return self._vmms.total()

    @property
    def without_hello(self) -> int:
        return self._queues.total()

    async def _admit(self, connection: Connection, door: Door) -> Visitor:
        """Each uid has limits of its own, so that none can keep another out."""
        uid, tenant = connection.peer.uid, connection.tenant
        if tenant.connections > self._limits.connections_per_uid:
            self.refusals[errno.errorcode[errno.ENOSPC]] += 1
            raise WireError(
                errno.ENOSPC,
                f"uid {uid} may have {self._limits.connections_per_uid} connections",
                limit="connections_per_uid",
            )
        limit = self._limits.connections_without_hello
        queue = (door, uid)
        if self._queues[queue] >= limit:
            self.refusals[errno.errorcode[errno.EAGAIN]] += 1
            raise ProtocolViolation(
                errno.EAGAIN,
                f"{limit} connections of uid {uid} have not said hello yet",
                limit="connections_without_hello",
            )
        self._queues[queue] += 1
        try:
            await tenant.turn()  # who comes, is refused and comes again keeps the pace too
            return await admit(connection, door, self._settings.now, self._journal)
        except Exception as error:
            tenant.fine()
            if isinstance(error, WireError):
                self.refusals[error.name] += 1
            elif not isinstance(error, HelloRefused):  # which is counted where all of them come by
                self.refusals[LEFT] += 1
            raise
        finally:
            self._queues[queue] -= 1
            if not self._queues[queue]:
                del self._queues[queue]

    # ------------------------------------------------ joining a partition

    def _join(self, visitor: Visitor, hello: PartitionHello) -> None:
        """Hand a connection to its partition. "No such partition" and "wrong token" are one error."""
        partition = self._partitions.find(hello.partition_id)
        if partition is None or not partition.admits(hello.token, visitor.connection.peer):
            raise WireError(errno.EACCES, "no such partition, or it is not yours to join")
        match hello:
            case messages.HelloVp():
                self._join_vp(visitor, partition, hello.vp_index)
            case messages.HelloNotifier():
                self._join_notifier(visitor, partition)
            case messages.HelloHypervisor():
                self._join_link(visitor, partition)

    def _join_vp(self, visitor: Visitor, partition: Partition, vp_index: int) -> None:
        limit = self._limits.vps_per_partition
        if vp_index >= limit:
            raise WireError(
                errno.EINVAL,
                f"vp_index must be below {limit}, got {vp_index}",
                field="vp_index",
                limit="vps_per_partition",
            )
        if (
            sum(len(one.vps) for one in self._partitions.of_uid(partition.owner.uid))
            >= self._limits.vps_per_uid
        ):
            raise WireError(
                errno.ENOSPC,
                f"uid {partition.owner.uid} may have {self._limits.vps_per_uid} VPs",
                limit="vps_per_uid",
            )
        if vp_index in partition.vps:
            raise WireError(errno.EEXIST, f"VP {vp_index} is attached already", vp_index=vp_index)
        vp = VirtualProcessor(
            vp_index,
            visitor.connection,
            architecture=partition.request.architecture,
            regions=partition.regions,
            path=partition.path,
            answers=partition.answers,
            journal=partition.journal,
        )
        partition.start_vp(vp, visitor.connection, visitor.welcome(self._hello_reply()))

    def _join_link(self, visitor: Visitor, partition: Partition) -> None:
        if partition.link is None:
            raise WireError(errno.EINVAL, "the partition's hypervisor is not vmm", field="role")
        if partition.link.claimed:
            raise WireError(errno.EEXIST, "the partition has a hypervisor connection already")
        partition.start_link(partition.link, visitor.connection, visitor.welcome(self._hello_reply()))

    def _join_notifier(self, visitor: Visitor, partition: Partition) -> None:
        limit = self._limits.notifiers_per_partition
        if partition.notifiers >= limit:
            raise WireError(
                errno.ENOSPC,
                f"a partition may have {limit} notifier connections",
                limit="notifiers_per_partition",
            )
        session = NotifierSession(partition.notifier)
        partition.start_notifier(
            visitor.connection,
            visitor.welcome(self._hello_reply()),
            partial(
                serve_calls,
                visitor.connection,
                messages.NOTIFIER_METHODS,
                session.answer,
                in_flight=partition.announcements,
            ),
            session.close,
        )

    # ------------------------------------------------ served here

    async def _serve_operator(self, visitor: Visitor) -> None:
        limit = self._limits.operators
        with visitor.refusing():
            if self.operators >= limit:
                raise WireError(errno.ENOSPC, f"{limit} operators are connected", limit="operators")
        self.operators += 1
        try:
            await visitor.connection.send(visitor.welcome(self._hello_reply()))
            await self._converse(visitor.connection)
        finally:
            self.operators -= 1

    async def _converse(self, connection: Connection) -> None:
        """Answer an operator, and tell it the events that it subscribed to, until it leaves."""
        subscription = Subscription()
        session = OperatorSession(self._overview, self._journal, subscription)
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
            self._journal.leave(subscription)
        if failure is not None:
            raise failure

    async def _serve_vmm(self, visitor: Visitor, hello: HelloVmm) -> None:
        """A VMM without a partition, and then the whole life of the one that it creates."""
        connection, uid = visitor.connection, visitor.connection.peer.uid
        limit = self._limits.vmms_per_uid
        with visitor.refusing():
            if self._vmms[uid] >= limit:
                raise WireError(errno.ENOSPC, f"uid {uid} may have {limit} VMMs", limit="vmms_per_uid")
        self._vmms[uid] += 1
        try:
            await connection.send(visitor.welcome(self._hello_reply()))
            while (request := await connection.receive()) is not None:
                try:
                    call = codec.decode_call(messages.VMM_METHODS, request.method, request.params)
                    partition = self._create_partition(call, hello.name, connection)
                except WireError as error:
                    await connection.send(rpc.encode_error(request.msgid, error))
                    continue
                await self._live(partition, connection, request.msgid)
                return
        finally:
            self._vmms[uid] -= 1

    def _create_partition(self, call: messages.VmmCall, name: str, connection: Connection) -> Partition:
        if not isinstance(call, CreatePartition):
            raise WireError(errno.ENOENT, f"{call.METHOD}: there is no partition yet, create_partition first")
        if self._partitions.closed:
            raise WireError(errno.ESHUTDOWN, "the daemon is draining and takes no more partitions")
        partition = self._factory.create(call, name, connection, self._partitions)
        self._partitions.add(partition)
        return partition

    async def _live(self, partition: Partition, connection: Connection, msgid: int) -> None:
        created = messages.CreatePartitionReply(partition_id=partition.partition_id, token=partition.token)

        live = partition.request.address_space is AddressSpaceKind.PROCESS
        descriptors = connection.box_descriptors() if live else DescriptorBox()

        async def serve() -> None:
            await connection.send(rpc.encode_result(msgid, codec.to_fields(created)))
            await serve_calls(connection, messages.VMM_METHODS, VmmSession(partition, descriptors).answer)

        try:
            await partition.run(serve)
        finally:
            self._partitions.remove(partition)
