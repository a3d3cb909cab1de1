"""The way from a listening socket that a client handed over to the memory of the VMM that connects to it.

Owns accepting, what must be true of a hand-off before anything is done with it, and that it stays in its
socket until it is kept: a VMM hands over once. Must not know what is done then.

The socket's open file is shared with the client, who may clear its O_NONBLOCK: a worker accepts. What was
accepted is the daemon's own.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from contextlib import suppress
from typing import Final

import trio

from intercept_protocol import handoff
from intercept_protocol.errors import EncodedError, ProtocolViolation
from intercept_protocol.handoff import Handoff, Refused
from intercept_protocol.text import sentence
from interceptd.address_space import Undecided
from interceptd.address_space.handed_userfaultfd import check_regions, prove
from interceptd.address_space.handover import Handover
from interceptd.address_space.workers import Workers
from interceptd.connections.closer import Closer
from interceptd.connections.peer import Peer, Pidfd
from interceptd.connections.received_fds import ReceivedFds, let_send_descriptors
from interceptd.connections.tenants import Tenant
from interceptd.descriptor_reserve import is_used_up
from interceptd.partition.handed_over import HandedOver
from interceptd.partition.kept_restore import KeptRestore
from interceptd.scheduling.time_share import give_way

HANDOFF_SECONDS: Final = 10.0
"""From the connection to the whole hand-off, and then for its examination."""
RETRY_SECONDS: Final = 0.1
"""After which a socket that could not be accepted, for want of descriptors or threads, is tried again."""
LOOK_SECONDS: Final = 0.01
"""Between two looks at a hand-off that comes in pieces: a socket with unread bytes is always readable."""
SO_PEEK_OFF: Final = 42
"""include/uapi/asm-generic/socket.h: a look (MSG_PEEK) begins where the last one ended."""


class HandoffListener:
    """Of one restore: its socket, the size of its image in bytes, and its uid. Calls `refused` with the
    reason why a connection was refused. With `kept` a hand-off outlives the daemon."""

    def __init__(
        self,
        listener: socket.socket,
        image_size: int,
        tenant: Tenant,
        workers: Workers,
        *,
        refused: Callable[[str, Peer], None],
        kept: KeptRestore | None = None,
    ) -> None:
        self._listener = listener
        self._image_size = image_size
        self._tenant = tenant
        self._workers = workers
        self._refused = refused
        self._kept = kept

    async def handed_over(self, connection: socket.socket | None = None) -> HandedOver:
        """Block until a VMM has handed over its memory. `connection` is one that a predecessor accepted."""
        while True:
            if connection is None:
                await trio.lowlevel.wait_readable(self._listener)
                await self._tenant.throttle()  # also for one that is refused and comes back at once
                connection = None if is_used_up() else await self._accept()
            if connection is None:
                await trio.sleep(RETRY_SECONDS)
                continue
            try:
                return await self._take_over(connection)
            except (Refused, EncodedError, Undecided, OSError) as error:
                self._refused(sentence(error), Peer.of(connection))
                self._hang_up(connection)
                connection = None
            except BaseException:
                self._hang_up(connection)
                raise

    def _hang_up(self, connection: socket.socket) -> None:
        """The keeper may have a duplicate of it."""
        if self._kept is not None:
            self._kept.refused()
            with suppress(OSError):  # the peer may have closed it
                connection.shutdown(socket.SHUT_RDWR)
        self._tenant.closer.close_connection(connection.detach())

    async def _accept(self) -> socket.socket | None:
        """None if nobody is there any more, or there are no descriptors or threads."""
        closer = self._tenant.closer
        accepting = Handover([], lambda _: _accept(self._listener, closer), closer)
        try:
            return (await accepting.made(HANDOFF_SECONDS, self._workers)).connection
        except (OSError, Undecided):
            return None

    async def _take_over(self, connection: socket.socket) -> HandedOver:
        """Raises `Refused`, `Undecided`, `EncodedError`, `OSError`."""
        connection.setblocking(False)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_OOBINLINE, 1)
        let_send_descriptors(connection, may=True)
        peer = Peer.of(connection)
        if peer.uid != self._tenant.uid:
            raise Refused(f"uid {peer.uid} is not who asked, uid {self._tenant.uid}")
        if self._kept is not None:
            await self._kept.connected(connection)
        received = ReceivedFds(self._tenant.closer, limit=1)
        try:
            whole = await look_at_handoff(connection, received)
            whole.check_image(self._image_size)
            descriptors = received.take()
        finally:
            received.close()
        if not descriptors:
            raise Refused("no descriptor came with it")
        closer = self._tenant.closer
        proving = Handover(descriptors, lambda found: _prove(found, whole, closer), closer)
        userfaultfd = await proving.made(HANDOFF_SECONDS, self._workers)
        pidfd = Pidfd.of(connection)
        if pidfd is None:
            userfaultfd.close()
            raise Refused("its process has ended")
        handed_over = HandedOver(connection, pidfd, userfaultfd.descriptor, whole.regions, closer)
        if self._kept is not None:
            try:
                await self._kept.handed_off(connection, userfaultfd.descriptor, whole.regions)
            except BaseException:
                handed_over.close_memory()
                raise
        _take_out(connection, closer)
        return handed_over


class _Accepted:
    """A connection on its way from a worker."""

    def __init__(self, connection: socket.socket, closer: Closer) -> None:
        self.connection = connection
        self._closer = closer

    def close(self) -> None:
        self._closer.close_connection(self.connection.detach())


class _Proven:
    """A userfaultfd on its way from a worker."""

    def __init__(self, descriptor: int, closer: Closer) -> None:
        self.descriptor = descriptor
        self._closer = closer

    def close(self) -> None:
        self._closer.close([self.descriptor])


def _accept(listener: socket.socket, closer: Closer) -> _Accepted:
    return _Accepted(listener.accept()[0], closer)


def _prove(descriptors: list[int], whole: Handoff, closer: Closer) -> _Proven:
    try:
        prove(descriptors[0])
        check_regions(descriptors[0], whole.regions)
    except BaseException:
        closer.close(descriptors)
        raise
    return _Proven(descriptors[0], closer)


def _take_out(connection: socket.socket, closer: Closer) -> None:
    """Take a hand-off out of its socket, which else keeps the userfaultfd open."""
    received = ReceivedFds(closer, limit=0)
    with suppress(OSError, ProtocolViolation):
        received.receive(connection, handoff.BYTES_LIMIT)


async def look_at_handoff(connection: socket.socket, received: ReceivedFds) -> Handoff:
    """What lies in a connection. Blocks for up to `HANDOFF_SECONDS`; raises `Refused`, `EncodedError` and
    `OSError`. `received` has duplicates of the descriptors then."""
    data = b""
    connection.setsockopt(socket.SOL_SOCKET, SO_PEEK_OFF, 0)
    with trio.move_on_after(HANDOFF_SECONDS):
        while True:
            try:
                piece = received.look(connection, handoff.BYTES_LIMIT + 1 - len(data))
            except BlockingIOError:
                if data:
                    await trio.sleep(LOOK_SECONDS)
                else:
                    await trio.lowlevel.wait_readable(connection)
                continue
            if not piece:
                raise Refused("the connection closed before the hand-off was whole")
            data += piece
            if (whole := handoff.parse(data)) is not None:
                return whole
            await give_way()
    raise Refused(f"the hand-off was not whole within {HANDOFF_SECONDS:g} s")
