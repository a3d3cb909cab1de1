"""How a VP, a notifier or a hypervisor connection joins its partition, which owns it from then on.

Owns the right to join, by token and uid, and the limits of what joins. Must not know what is served there.
"""

from __future__ import annotations

import errno
from collections.abc import Awaitable, Callable
from functools import partial

from intercept_protocol import _announcement_codec, messages
from intercept_protocol.errors import WireError
from intercept_protocol.messages import HelloReply, PartitionHello
from interceptd.address_space.process import ProcessAddressSpace
from interceptd.config.live import Settings
from interceptd.connections.connection import Connection
from interceptd.connections.request_loop import serve_calls
from interceptd.partition.keeping import Hello
from interceptd.partition.partition import Partition
from interceptd.partition.registry import PartitionRegistry
from interceptd.partition.virtual_processor import VirtualProcessor
from interceptd.sessions.handshake import Handshake
from interceptd.sessions.notifier import NotifierSession, unwatched
from interceptd.sessions.vmm import kick


class Attacher:
    """One for all partitions. `hello_reply` makes the reply to every hello."""

    def __init__(
        self, settings: Settings, partitions: PartitionRegistry, hello_reply: Callable[[], HelloReply]
    ) -> None:
        self._settings = settings
        self._partitions = partitions
        self._hello_reply = hello_reply

    def attach(self, handshake: Handshake, hello: PartitionHello) -> None:
        """Hand a connection to its partition. "No such partition" and "wrong token" are one error."""
        partition = self._partitions.find(hello.partition_id)
        if partition is None or not partition.admits(hello.token, handshake.connection.peer):
            raise WireError(errno.EACCES, "no such partition, or it is not yours to join")
        match hello:
            case messages.HelloVp():
                self._vp(handshake, partition, hello.vp_index)
            case messages.HelloNotifier():
                self._notifier(handshake, partition)
            case messages.HelloHypervisor():
                self._link(handshake, partition, takes_lists=hello.lists)

    def _vp(self, handshake: Handshake, partition: Partition, vp_index: int) -> None:
        limit = self._settings.now.limits.vps_per_partition
        if vp_index >= limit:
            raise WireError(
                errno.EINVAL,
                f"vp_index must be below {limit}, got {vp_index}",
                field="vp_index",
                limit="vps_per_partition",
            )
        if vp_index in partition.vps or vp_index in partition.returning:
            raise WireError(errno.EEXIST, f"VP {vp_index} is attached already", vp_index=vp_index)
        vp = virtual_processor(partition, vp_index, handshake.connection)
        handshake.connection.expect_short_requests()
        handshake.connection.let_send_descriptors()  # an intercept that brings some is answered all the same
        partition.start_vp(
            vp,
            handshake.connection,
            handshake.hello_reply(self._hello_reply()),
            Hello("vp", handshake.msgid, vp_index),
        )

    def _link(self, handshake: Handshake, partition: Partition, *, takes_lists: bool) -> None:
        if partition.link is None:
            raise WireError(errno.EINVAL, "the partition's hypervisor is not vmm", field="role")
        if partition.link.claimed:
            raise WireError(errno.EEXIST, "the partition has a hypervisor connection already")
        partition.link.takes_lists = takes_lists
        handshake.connection.expect_responses()
        partition.start_link(
            partition.link,
            handshake.connection,
            handshake.hello_reply(self._hello_reply()),
            Hello("hypervisor", handshake.msgid, lists=takes_lists),
        )

    def _notifier(self, handshake: Handshake, partition: Partition) -> None:
        limit = self._settings.now.limits.notifiers_per_partition
        if partition.notifiers >= limit:
            raise WireError(
                errno.ENOSPC,
                f"a partition may have {limit} notifier connections",
                limit="notifiers_per_partition",
            )
        session = notifier_session(partition, handshake.connection)
        handshake.connection.expect_short_requests(_announcement_codec.match)
        partition.start_notifier(
            handshake.connection,
            handshake.hello_reply(self._hello_reply()),
            serving_notifier(partition, session, handshake.connection),
            session.close,
            Hello("notifier", handshake.msgid),
        )


def virtual_processor(partition: Partition, vp_index: int, connection: Connection) -> VirtualProcessor:
    return VirtualProcessor(
        vp_index,
        connection,
        architecture=partition.request.architecture,
        faults=partition.faults,
        answers=partition.answers,
        event_bus=partition.event_bus,
    )


def notifier_session(partition: Partition, connection: Connection | None) -> NotifierSession:
    """Of a connection that is served, or of None, which can only be closed."""
    memory = partition.memory
    catch_up = memory.catch_up if isinstance(memory, ProcessAddressSpace) else None
    return NotifierSession(
        partition.notifier,
        partition.regions,
        partial(kick, partition),
        catch_up,
        unwatched if connection is None else connection.answer_watched,
    )


def serving_notifier(
    partition: Partition, session: NotifierSession, connection: Connection
) -> Callable[[], Awaitable[None]]:
    """A function that answers the calls of a notifier connection."""
    return partial(
        serve_calls,
        connection,
        messages.NOTIFIER_METHODS,
        session.answer,
        in_flight=partition.announcements,
        journal=partition.journal,
        watched=False,
    )
