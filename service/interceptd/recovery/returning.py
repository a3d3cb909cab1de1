"""One VMM that comes back, with its partition and its connections.

Owns the order in which they come back, and what each connection is owed. Must not know what a request does:
either its answer is in the log, or it is received again.

Stray and doubtful mappings are unmapped before anybody is served, so the VMM's hypervisor comes back first.
The VMM's memory is watched again before its calls and its VPs are answered.
"""

from __future__ import annotations

import errno
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import structlog
import trio

from intercept_protocol import _announcement_codec, codec, events, messages, rpc
from intercept_protocol._frames import REQUEST_VALUES_VMM
from intercept_protocol.addresses import GfnRange, UaddrRange
from intercept_protocol.errors import ProtocolViolation, WireError
from intercept_protocol.messages import INTERCEPT_METHOD
from intercept_protocol.outcomes import Answer
from intercept_protocol.text import sentence
from interceptd.address_space.descriptors import adopt
from interceptd.address_space.process import ProcessAddressSpace
from interceptd.address_space.userfaultfd import parse_events
from interceptd.connections.connection import Connection
from interceptd.connections.received_fds import ReceivedFds
from interceptd.connections.request_loop import report_and_close
from interceptd.errors import PartitionLost
from interceptd.hypervisor import HypervisorError
from interceptd.ledger import records
from interceptd.ledger.inbox import HYPERVISOR_INBOX, VMM_INBOX, Inbox
from interceptd.partition.keeping import Keeping
from interceptd.partition.partition import Partition
from interceptd.recovery.fold import Fold
from interceptd.recovery.remains import Remains
from interceptd.recovery.restore import announce, restore, settle
from interceptd.scheduling.time_share import give_way
from interceptd.sessions.attach import notifier_session, serving_notifier, virtual_processor
from interceptd.sessions.dispatcher import Dispatcher, created
from interceptd.telemetry.counters import Source

log = structlog.get_logger()

STRIKES = 3
"""After so many daemons have died of a request, its connection ends instead."""
SUSPECTED = 2
"""After so many the log names it: many requests are owed when a daemon dies, few when its successor does."""
LINK_SECONDS = 5.0
"""How long the hypervisor connection may take to be served again. It can only wait for a peer that has not
read the answer to its hello."""


class Left(NamedTuple):
    """What a predecessor left of one VMM. `remains` no longer contains the VMM's own connection."""

    remains: Remains
    fold: Fold
    keeping: Keeping
    rested: bool
    """Whether the predecessor rested: then no request killed it."""


class Owed(NamedTuple):
    """What a connection was owed when the predecessor died."""

    hello: bool
    request: rpc.Request | None
    received: bytes
    """The request, or the beginning of one."""


class ReturningVmm:
    """Calls `found` once its partition can be joined, and `count` with the numbers of partitions and
    connections that came back."""

    def __init__(
        self,
        dispatcher: Dispatcher,
        left: Left,
        vmm: Connection,
        found: Callable[[], None],
        count: Callable[[int, int], None],
    ) -> None:
        self._dispatcher = dispatcher
        self._remains, self._fold, self._keeping, self._predecessor_rested = left
        self._vmm = vmm
        self._found = found
        self._count = count
        self._strays: list[GfnRange] = []

    async def run(self) -> None:
        """Bring the VMM back, and serve it to its end."""
        vmm = self._vmm
        with report_and_close(vmm, self._dispatcher.event_bus):
            vmm.count_kept()
            vmm.tenant.vmms.add(1)
            try:
                vmm.expect_long_requests()
                if self._fold.created is None:
                    await self._serve_new_vmm()
                else:
                    await self._live(self._fold.created)
            finally:
                self._found()
                self._remains.let_go(self._vmm.tenant.closer)
                self._keeping.end()
                vmm.tenant.vmms.release()

    # ------------------------------------------------ a VMM without a partition

    async def _serve_new_vmm(self) -> None:
        opened = self._fold.opened
        assert opened is not None, "else it was not welcomed"
        owed = self._take_over(self._vmm, VMM_INBOX)
        self._remains.let_go(self._vmm.tenant.closer)
        self._found()
        self._count(0, 1)
        reply = self._hello_reply(opened.msgid) if owed.hello else await self._restore_reply(owed)
        lost = None
        if reply:
            await self._vmm.answer(reply)
        else:
            self._receive_again(self._vmm, owed)
            lost = _handed_over_too_late("") if owed.received else None
        await self._dispatcher.serve_new_vmm(self._vmm, opened.name, self._keeping, lost)

    async def _restore_reply(self, owed: Owed) -> bytes:
        """The answer to a `restore` that was carried out; empty if none was."""
        if owed.request is None or owed.request.method != messages.Restore.METHOD:
            return b""
        asked_by = self._vmm.cookie, self._keeping.ledger.inbox(VMM_INBOX).serial
        reply = await self._dispatcher.restores.owed_to(asked_by)
        return b"" if reply is None else rpc.encode_result(owed.request.msgid, codec.to_fields(reply))

    # ------------------------------------------------ a partition

    async def _live(self, record: records.Created) -> None:
        opened = self._fold.opened
        assert opened is not None, "else it was not welcomed"
        partition = self._dispatcher.recreate(record, opened.name, self._vmm, self._keeping)
        self._count(1, 0)

        async def before(descriptors: ReceivedFds) -> bytes:
            self._strays = await restore(partition, self._fold)
            announce(partition, self._fold)
            self._invalidate_event(partition)
            joined = self._fold.joined.values()
            partition.returning.update(each.vp_index for each in joined if each.role == "vp")
            self._found()
            owed = self._take_over(self._vmm, VMM_INBOX)
            await self._bring_back(partition, owed)
            return await self._owed_to_vmm(partition, record, owed, descriptors)

        await self._dispatcher.live(partition, self._vmm, before=before)

    async def _bring_back(self, partition: Partition, owed: Owed) -> None:
        """Everything but the VMM's calls."""
        await self._link(partition)
        await self._attach_memory(partition, owed)
        try:
            await settle(partition, self._strays)
        except HypervisorError as error:
            why = f"what a dead daemon has left unfinished cannot be undone: {sentence(error)}"
            raise PartitionLost(why) from error
        partition.is_back()
        connections = 1
        for joined in list(self._fold.joined.values()):
            if joined.inbox != HYPERVISOR_INBOX:
                connections += await self._join(partition, joined)
            await give_way()
        self._remains.let_go(self._vmm.tenant.closer)  # stored, but not recorded: never welcomed
        self._count(0, connections)
        statistics = partition.statistics()
        log.info("partition_recovered", regions=statistics.regions, connections=connections)
        partition.event_bus.publish(
            events.PartitionRecovered(
                regions=statistics.regions, mappings=statistics.slat_extents, connections=connections
            )
        )

    def _invalidate_event(self, partition: Partition) -> None:
        """Serve the userfaultfd event that the predecessor read, and may not have recorded."""
        for uaddrs in parse_events(self._keeping.event):
            partition.notifier.invalidate(uaddrs, Source.USERFAULTFD)
        self._keeping.event[:] = bytes(len(self._keeping.event))

    async def _link(self, partition: Partition) -> None:
        joined = self._fold.joined.get(HYPERVISOR_INBOX)
        if joined is None or partition.link is None:
            return
        connection = self._connection(joined)
        if connection is None:
            raise PartitionLost("the hypervisor connection closed")
        partition.link.takes_lists = joined.lists
        connection.expect_responses()
        connection.expect_one_at_a_time()
        owed = self._take_over(connection, HYPERVISOR_INBOX)
        connection.feed(owed.received)
        partition.start_link(partition.link, connection, self._owed_hello(owed, joined))
        with trio.move_on_after(LINK_SECONDS):
            await partition.link.wait_connected()
        if not partition.link.connected:
            raise PartitionLost("the hypervisor connection closed")

    async def _attach_memory(self, partition: Partition, owed: Owed) -> None:
        """Watch the VMM's memory again. If a handover lacks only its record, the record is added."""
        memory, attached = partition.memory, self._fold.attached
        if not isinstance(memory, ProcessAddressSpace):
            return
        request = owed.request
        if attached is None and self._remains.memory and request is not None and _is_attach(request):
            fields: Any = request.params[0] if request.params else {}
            inbox = self._keeping.ledger.inbox(VMM_INBOX)
            done = records.Done(VMM_INBOX, inbox.serial, request.method, fields, None)
            self._keeping.journal.append(done)
            self._fold.apply(done)
            attached = self._fold.attached
        if attached is None:
            await self._keeping.forget_memory()
            return
        if not self._remains.memory:
            raise PartitionLost("the VMM's memory was not kept")
        descriptors, self._remains.memory = self._remains.memory, []
        memory.adopt(adopt(descriptors, promised=attached.promised, closer=partition.tenant.closer))

    async def _join(self, partition: Partition, joined: records.Joined) -> int:
        """Bring back a VP or a notifier connection; returns how many connections came back."""
        if joined.role == "vp":
            partition.returning.discard(joined.vp_index)  # this step brings it back, or it has left
        connection = self._connection(joined)
        if connection is None:
            self._keeping.left(joined.inbox)
            session = notifier_session(partition, None)
            session.take_over(self._begun(joined.inbox))
            await session.close()
            return 0
        connection.expect_short_requests(None if joined.role == "vp" else _announcement_codec.match)
        owed = self._take_over(connection, joined.inbox)
        if joined.role == "vp":
            self._join_vp(partition, connection, joined, owed)
        else:
            self._join_notifier(partition, connection, joined, owed)
        return 1

    def _join_vp(
        self, partition: Partition, connection: Connection, joined: records.Joined, owed: Owed
    ) -> None:
        connection.expect_one_at_a_time()
        vp = virtual_processor(partition, joined.vp_index, connection)
        vp.kick()  # one may have been lost
        reply = self._owed_hello(owed, joined)
        if owed.request is not None and owed.request.method == INTERCEPT_METHOD:
            reply = rpc.encode_result(owed.request.msgid, Answer.RESTARTED.value)

            async def ask_again() -> None:
                await connection.wait_readable()
                self._strike(connection, INTERCEPT_METHOD)

            partition.start_vp(vp, connection, reply, before=ask_again)
            return
        self._receive_again(connection, owed)
        partition.start_vp(vp, connection, reply)

    def _join_notifier(
        self, partition: Partition, connection: Connection, joined: records.Joined, owed: Owed
    ) -> None:
        session = notifier_session(partition, connection)
        session.take_over(self._begun(joined.inbox))
        reply = self._owed_hello(owed, joined) or self._recorded_reply(connection, owed)
        if not reply:
            self._receive_again(connection, owed)
        serve = serving_notifier(partition, session, connection)
        partition.start_notifier(connection, reply, serve, session.close)

    async def _owed_to_vmm(
        self, partition: Partition, record: records.Created, owed: Owed, descriptors: ReceivedFds
    ) -> bytes:
        """The answer that the VMM waits for; empty if its request is received again."""
        request = owed.request
        if request is None:
            if owed.received:  # its descriptors came with the beginning of the request
                descriptors.lose(_handed_over_too_late())
            self._receive_again(self._vmm, owed)
            return b""
        if self._keeping.ledger.inbox(VMM_INBOX).serial == record.serial:
            return created(partition, request.msgid)
        reply = self._recorded_reply(self._vmm, owed)
        if not reply:
            if _is_attach(request):
                descriptors.lose(_handed_over_too_late())
            self._receive_again(self._vmm, owed)
        return reply

    # ------------------------------------------------ what is owed

    def _connection(self, joined: records.Joined) -> Connection | None:
        kept = self._remains.connections.pop(joined.cookie, None)
        if kept is None:
            return None
        connection = Connection(kept, self._dispatcher.admission.tenants, self._dispatcher.watch)
        connection.count_kept()
        return connection

    def _take_over(self, connection: Connection, number: int) -> Owed:
        inbox: Inbox = self._keeping.ledger.inbox(number)
        received = inbox.take_over()
        connection.use(inbox)
        if inbox.owes_hello:
            return Owed(hello=True, request=None, received=b"")
        return Owed(hello=False, request=_whole_request(received), received=received)

    def _owed_hello(self, owed: Owed, joined: records.Joined) -> bytes:
        return self._hello_reply(joined.msgid) if owed.hello else b""

    def _hello_reply(self, msgid: int) -> bytes:
        return rpc.encode_result(msgid, codec.to_fields(self._dispatcher.hello_reply()))

    def _recorded_reply(self, connection: Connection, owed: Owed) -> bytes:
        """The answer to a request that was carried out; empty if it was not."""
        assert connection.inbox is not None, "it was taken over"
        last = self._fold.last.get(connection.inbox.number)
        if owed.request is None or last is None or last.serial != connection.inbox.serial:
            return b""
        return rpc.encode_result(owed.request.msgid, last.reply)

    def _receive_again(self, connection: Connection, owed: Owed) -> None:
        """Count a strike only when the request is carried out: before that it cannot cause a death."""
        begin = None if owed.request is None else partial(self._strike, connection, owed.request.method)
        connection.feed(owed.received, begin)

    def _strike(self, connection: Connection, method: str) -> None:
        assert connection.inbox is not None, "it was taken over"
        if self._predecessor_rested:
            return
        connection.inbox.strike()
        deaths = connection.inbox.strikes
        if deaths >= SUSPECTED:
            log.warning("request_suspected", method=method, deaths=deaths, **connection.peer.named)
        if deaths >= STRIKES:
            raise ProtocolViolation(
                errno.EIO,
                f"{STRIKES} daemons have died of a request; it is not carried out again",
            )

    def _begun(self, inbox: int) -> Counter[UaddrRange]:
        return self._fold.begun.get(inbox, Counter())


def _whole_request(received: bytes) -> rpc.Request | None:
    receiver = rpc.Receiver({rpc.REQUEST}, REQUEST_VALUES_VMM)
    receiver.receive_data(received)
    try:
        message = receiver.next_message()
    except ProtocolViolation:
        return None  # receiving it again refuses it
    assert isinstance(message, rpc.Request | None), "the receiver accepts nothing else"
    return message


def _is_attach(request: rpc.Request) -> bool:
    return request.method == messages.AttachMemory.METHOD


def _handed_over_too_late(addition: str = ", with a new userfaultfd") -> WireError:
    return WireError(
        errno.EAGAIN,
        f"the daemon was restarted before it had kept the descriptors; send them again{addition}",
    )
