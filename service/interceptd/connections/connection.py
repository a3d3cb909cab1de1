"""One accepted connection: requests in, answers out, one after the other.

Owns the socket, the receive buffer, and what a peer may send before it has its answer. The buffer of a
connection that outlives the daemon is an `Inbox`. Must not know roles or methods.
"""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import TypeVar

import trio

from intercept_protocol import rpc
from intercept_protocol._announcement_codec import AnnouncementRequest
from intercept_protocol._frames import REQUEST_VALUES, REQUEST_VALUES_VMM, SHORT_REQUESTS
from intercept_protocol.errors import EncodedError, ProtocolViolation, WireError
from intercept_protocol.text import sentence
from interceptd.connections.fairness import ALONE, TURN, Turns
from interceptd.connections.hangup_watch import HUNG_UP, READABLE_OR_HUNG_UP, HangupWatch
from interceptd.connections.moment import readable_in_a_moment
from interceptd.connections.peer import Peer, Pidfd, peer_groups
from interceptd.connections.received_fds import KEPT_LIMIT, ReceivedFds, let_send_descriptors, read_rest
from interceptd.connections.request_reader import RequestReader
from interceptd.connections.socket_cookie import cookie_of
from interceptd.connections.tenants import Tenants
from interceptd.connections.unread import may_bring_descriptors, unread_bytes
from interceptd.ledger.inbox import Inbox
from interceptd.scheduling.time_share import give_way

RECEIVE_BYTES = 4096
"""Bytes per read: fifteen intercepts."""
REST_SECONDS = 5.0
"""How long the rest of a request may take once its descriptors are here. Usually both come in one message. So
long, too, may descriptors stay unread because their peer reads no answers."""
LAST_LOOK_SECONDS = 0.1
"""After a peer's deadline, time to read what it sent in time: a peer must not pay for a pause of the daemon
(a signal, a debugger, a suspended machine)."""
SHORT_ANSWER_BYTES = 4 << 10
LONG_ANSWER_BYTES = 38 << 10
HYPERVISOR_REQUEST_BYTES = 8 << 10
"""SO_SNDBUF, by default 208 KiB: how much may lie unread, in kernel memory that is the daemon's. The kernel
doubles it, takes 0.8 KiB even for a short message, and sends at once what has 64 bytes less, and less than 35
KiB (`unix_stream_sendmsg`): every message of its kind."""
BATCH = 16
"""Elements of lists that cost as much as a request."""
LATE = 16
"""Answers that are not waited for after one that was late: a VMM that is slow or stopped takes at most a
sixteenth of a moment per request from others."""
_HOT_PATH = Turns()
"""Shared by the VPs of all partitions, as they share one event loop."""


class ConnectionGone(Exception):
    """The peer closed, or the connection broke."""


Whole = TypeVar("Whole")
Recognise = Callable[[bytes], AnnouncementRequest | None]
Answered = TypeVar("Answered")


class Connection:
    """A stream of requests from one peer. `receive` and `answer_watched` are for one task only.

    A request is taken out of the socket, with its descriptors, when the one before it is answered: nothing is
    queued here. After `forbid_pipelining` a second request before the answer is a violation.
    """

    def __init__(self, accepted: socket.socket, tenants: Tenants, watch: HangupWatch) -> None:
        accepted.setblocking(False)
        # Otherwise the kernel skips an urgent byte (MSG_OOB), and closes its descriptors in this thread.
        accepted.setsockopt(socket.SOL_SOCKET, socket.SO_OOBINLINE, 1)
        self.peer = Peer.of(accepted)
        self.tenant = tenants.of(self.peer.uid)
        self._counted = False
        self._socket = accepted
        self._watch = watch
        self._receiver = rpc.Receiver({rpc.REQUEST}, REQUEST_VALUES)
        self._requests = RequestReader(accepted)
        self._inbox: Inbox | None = None
        self._has_response = False
        """Whether the inbox holds a response that `receive_response` has returned."""
        self._turn = 0
        self._ends_wait = HUNG_UP
        """What ends the wait for an answer."""
        self._late = 0
        """Answers that are not waited for, because one was late."""
        self._unpaid: rpc.Request | AnnouncementRequest | None = None
        """A request that was received and waits for its turn."""
        self._recognise: Recognise | None = None
        self._begin: Callable[[], None] | None = None
        """Called when a fed request has its turn."""
        self._descriptors = ReceivedFds(self.tenant.closer, 0)
        self._rest_due: float | None = None
        """When the descriptors of an incomplete request are closed."""

    def count(self) -> None:
        """Count it against its uid until it is closed. Raises ENOSPC at the uid's limit."""
        self.tenant.count_connection()
        self._counted = True

    def count_kept(self) -> None:
        """Count it regardless of the limit: a predecessor accepted it."""
        self.tenant.count_kept_connection()
        self._counted = True

    def peer_groups(self) -> frozenset[int]:
        return peer_groups(self._socket)

    def peer_pidfd(self) -> Pidfd | None:
        """A pidfd of the process that connected; the caller closes it."""
        return Pidfd.of(self._socket)

    def keep_descriptors(self, limit: int = KEPT_LIMIT) -> ReceivedFds:
        """Let the peer send descriptors, and keep so many; before this call they are closed."""
        self.let_send_descriptors()
        self._descriptors = ReceivedFds(self.tenant.closer, limit)
        return self._descriptors

    def let_send_descriptors(self) -> None:
        """The kernel may refuse them on an accepted connection, see `listen_unix`."""
        let_send_descriptors(self._socket, may=True)

    def forbid_pipelining(self) -> None:
        """Raises `ProtocolViolation` for a second request, also for one that is here already."""
        self._ends_wait = READABLE_OR_HUNG_UP
        if unread_bytes(self._socket):
            raise _second_request()

    def expect_one_at_a_time(self) -> None:
        """The same, if the peer may already have sent one while no daemon ran."""
        self._ends_wait = READABLE_OR_HUNG_UP

    @property
    def descriptor(self) -> int:
        return self._socket.fileno()

    @property
    def cookie(self) -> int:
        """The kernel's number of the socket, which is never used again (SO_COOKIE)."""
        return cookie_of(self._socket)

    @property
    def inbox(self) -> Inbox | None:
        return self._inbox

    def use(self, inbox: Inbox) -> None:
        """Receive into `inbox` from now on, where a successor finds it."""
        self._inbox = self._requests.inbox = inbox

    def feed(self, received: bytes, begin: Callable[[], None] | None = None) -> None:
        """Treat what a predecessor received and did not answer as if it came now. `receive` calls `begin`
        before it returns the request, and passes on what that raises."""
        self._receiver.receive_data(received)
        self._begin = begin

    def mark_answered(self, *, put_off: bool = False) -> None:
        """Mark the request as answered, see `Inbox.answered`; `answer` does so itself."""
        if self._inbox is not None:
            self._inbox.answered(put_off=put_off)

    def lose_descriptors(self, why: WireError) -> None:
        """Report the descriptors of the next request as lost."""
        self._descriptors.lose(why)

    def drop_descriptors(self) -> None:
        """Close the descriptors that came with the last request and were not taken."""
        self._rest_due = None
        self._descriptors.drop()

    def close(self) -> None:
        """Close at once; idempotent. Another task that waits on the socket by itself gets `ConnectionGone`.

        If there are unread descriptors, a thread closes the socket, and them with it.
        """
        if self._socket.fileno() >= 0:
            trio.lowlevel.notify_closing(self._socket)
            if self._descriptors.received:
                self.tenant.charge(self._descriptors.received)
            self._descriptors.close()
            with suppress(OSError):  # it is broken
                # Nothing can come any more, and the peer reads the end behind our last message. This also
                # makes the keeper drop its duplicate.
                self._socket.shutdown(socket.SHUT_RDWR)
            if read_rest(self._socket):
                self.tenant.closer.close_connection(self._socket.detach())
            else:
                self._socket.close()
            if self._counted:
                self.tenant.forget_connection()

    async def wait_readable(self) -> None:
        """Block until something was sent, or the peer has closed. Raises `ConnectionGone`."""
        await self._parked_readable()

    async def receive(self) -> rpc.Request | AnnouncementRequest | None:
        """The next request, as soon as the rate limit of its uid allows; None when the peer has closed.
        Raises `ProtocolViolation`, `ConnectionGone`. A cancelled call loses nothing: call it again."""
        if self._unpaid is None:
            self._unpaid = await self._receive()
        if self._unpaid is not None:
            batches = _batches(self._unpaid) if isinstance(self._unpaid, rpc.Request) else 0
            await self._pay(batches)
            if batches:
                await give_way()  # a long list took long to decode, and carrying it out will
        request, self._unpaid = self._unpaid, None
        begin, self._begin = self._begin, None
        if begin is not None:
            begin()
        return request

    async def _receive(self) -> rpc.Request | AnnouncementRequest | None:
        await self._let_others_run()
        message = await self._receive_one()
        assert isinstance(message, rpc.Request | AnnouncementRequest | None), (
            "the receiver accepts nothing else"
        )
        return message

    async def _receive_one(self) -> rpc.Message | AnnouncementRequest | None:
        """The next message, taken out of the socket without a byte of the one behind it."""
        message: rpc.Message | AnnouncementRequest | None = None
        if self._receiver.has_bytes:
            message = self._receiver.next_message()
        while message is None:
            try:
                message = self._requests.read(self._receiver, self._descriptors, self._recognise)
            except BlockingIOError:
                await self._wait_readable()
            except EOFError:
                return None
            except OSError as error:
                raise ConnectionGone(sentence(error)) from error
            else:
                if message is None:
                    await trio.lowlevel.checkpoint()  # a long message takes long to scan
        return message

    async def _receive_only(self) -> rpc.Request | None:
        """Where nothing may follow the request."""
        await self._let_others_run()
        message = await self._next_message()
        assert isinstance(message, rpc.Request | None), "the receiver accepts nothing else"
        if message is not None and self._receiver.has_bytes:
            raise _second_request()
        return message

    async def _let_others_run(self) -> None:
        """A socket that is never found empty parks no task."""
        self._turn += 1
        if self._turn >= TURN:
            self._turn = 0
            await trio.lowlevel.checkpoint()

    async def receive_whole(self, recognise: Callable[[bytes], Whole | None]) -> Whole | rpc.Request | None:
        """Like `receive`, for the hot path: if `recognise` accepts one whole read, return its result.

        While no other VP is busy, yield the CPU once before waiting: a peer on the same CPU often has its
        next message ready then, which saves a round through epoll. Not rate-limited, because a VP has one
        intercept in flight, unless descriptors come along, which no intercept needs.
        """
        running = _HOT_PATH.running(self)
        may_yield = running > ALONE
        if not may_yield or not running % TURN:
            await trio.lowlevel.checkpoint()
        if self._receiver.has_bytes:
            return await self._receive_only()
        while True:
            try:
                data = self._descriptors.receive(self._socket, RECEIVE_BYTES, self._inbox)
                break
            except BlockingIOError:
                if may_yield:
                    may_yield = False
                    os.sched_yield()
                else:
                    await self._parked_readable()
            except OSError as error:
                raise ConnectionGone(sentence(error)) from error
        if self._descriptors.received:
            await self._pay()
            self._descriptors.drop()
        whole = recognise(data)
        if whole is not None:
            return whole
        if not data:
            return None
        if self._inbox is not None:
            self._inbox.note(len(data))
        self._receiver.receive_data(data)
        return await self._receive_only()

    def expect_short_requests(self, recognise: Recognise | None = None) -> None:
        """From now on accept only requests that fit into a small inbox: a VP's or a notifier's. `recognise`
        decodes the usual ones, if one is all that a look shows."""
        self._recognise = recognise
        self._let_lie_unread(SHORT_ANSWER_BYTES)
        self._receiver = rpc.Receiver({rpc.REQUEST}, SHORT_REQUESTS)

    def expect_long_requests(self) -> None:
        """From now on a request may hold lists, as a VMM's do."""
        self._let_lie_unread(LONG_ANSWER_BYTES)
        self._receiver = rpc.Receiver({rpc.REQUEST}, REQUEST_VALUES_VMM)

    def expect_responses(self) -> None:
        """From now on the daemon sends the requests and the peer answers, perhaps without reading them."""
        self._let_lie_unread(HYPERVISOR_REQUEST_BYTES)
        self._receiver = rpc.Receiver({rpc.RESPONSE}, REQUEST_VALUES)

    async def receive_response(self) -> rpc.Response | None:
        """The peer's next answer; None when it has closed. Wipes the last one. Raises like `receive`."""
        if self._has_response:
            self.mark_answered()
        message = await self._receive_one()
        self._has_response = True
        assert isinstance(message, rpc.Response | None), "the receiver accepts nothing else"
        return message

    def take_soon(self, likely: bytes) -> bool:
        """Take `likely` if just that is the answer to what was sent a moment ago. Anything else is left to
        `receive_response`. Raises `ConnectionGone`.

        While no other VP is busy, blocks for that moment: a peer that runs answers meanwhile, which saves two
        task switches and a round through epoll. One that was late is not waited for again for a while.
        """
        if self._late:
            self._late -= 1
            return False
        if not _HOT_PATH.is_lonely or self._receiver.has_bytes:
            return False
        os.sched_yield()  # if the peer is on the same CPU, its answer is here then
        try:
            try:
                return self._requests.take(likely)
            except BlockingIOError:
                if readable_in_a_moment(self._socket.fileno()):
                    return self._requests.take(likely)
        except OSError as error:
            raise ConnectionGone(sentence(error)) from error
        self._late = LATE
        return False

    async def send(self, data: bytes) -> None:
        """Send a message; blocks while the peer does not read. Raises `ConnectionGone`.

        Descriptors that the peer has sent must not stay unread for ever: one may be its own end of this
        connection, which would keep the connection open after the peer's death.
        """
        while data := self.send_now(data):
            with trio.move_on_after(REST_SECONDS) as patience:
                await self._parked(trio.lowlevel.wait_writable)
            if patience.cancelled_caught and may_bring_descriptors(self._socket):
                self._socket.shutdown(socket.SHUT_RDWR)  # its other tasks find it broken, too
                raise ConnectionGone("it reads no answers, and descriptors may lie unread")

    async def answer(self, data: bytes) -> None:
        """Send an answer; blocks while the peer does not read. Raises like `answer_watched`."""
        if rest := self.send_now(data):
            await self.answer_watched(self.send(rest))
        if self._inbox is not None:
            self._inbox.answered()

    async def answer_watched(self, answering: Awaitable[Answered]) -> Answered:
        """Await `answering`. When the peer closes meanwhile, cancel it, and raise `ConnectionGone`; when it
        sends what it may not, `ProtocolViolation`."""
        with trio.CancelScope() as wait:
            self._watch.add(descriptor := self._socket.fileno(), self._ends_wait, wait)
            try:
                return await answering
            finally:
                self._watch.remove(descriptor)
        if self._ends_wait == READABLE_OR_HUNG_UP and unread_bytes(self._socket):
            raise _second_request()
        raise ConnectionGone("closed before the answer")

    def refuse(self, error: EncodedError, msgid: int = 0) -> None:
        """Send the reason why the connection ends: as the answer to `msgid`, or under msgid 0. Never blocks;
        close the connection afterwards."""
        with suppress(OSError):  # the peer is gone or does not read
            self._socket.send(rpc.encode_error(msgid, error), socket.MSG_NOSIGNAL)

    def _let_lie_unread(self, size: int) -> None:
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, size)

    async def _next_message(self) -> rpc.Message | None:
        """The next message, where no second one may follow."""
        while (message := self._receiver.next_message()) is None:
            if self._receiver.has_bytes:
                await trio.lowlevel.checkpoint()  # a long message takes long to scan
            data = await self._read()
            if not data:
                return None
            self._receiver.receive_data(data)
        return message

    async def _read(self) -> bytes:
        while True:
            try:
                data = self._descriptors.receive(self._socket, RECEIVE_BYTES, self._inbox)
            except BlockingIOError:
                await self._wait_readable()
            except OSError as error:
                raise ConnectionGone(sentence(error)) from error
            else:
                if self._inbox is not None:
                    self._inbox.note(len(data))
                return data

    async def _wait_readable(self) -> None:
        """Wait for more bytes. Descriptors whose request stays incomplete are closed after `REST_SECONDS`.

        One of them may be the peer's own end of this connection: holding it, we would never notice that the
        peer is gone.
        """
        if not self._descriptors.holds_any:
            await self._parked_readable()
            return
        if self._rest_due is None:
            self._rest_due = trio.current_time() + REST_SECONDS
        with trio.move_on_at(self._rest_due) as patience:
            await self._parked_readable()
        if patience.cancelled_caught:
            self._descriptors.lose(_too_late())

    async def _pay(self, batches: int = 0) -> None:
        """Keep the pace of the uid's requests. A descriptor costs as much as one, and so does a batch."""
        await self.tenant.throttle(1 + self._descriptors.received + batches)

    def send_now(self, data: bytes) -> bytes:
        """Send as much as possible without blocking; returns the rest. Raises `ConnectionGone`."""
        try:
            return data[self._socket.send(data, socket.MSG_NOSIGNAL) :]
        except BlockingIOError:
            return data
        except OSError as error:
            raise ConnectionGone(sentence(error)) from error

    def _parked_readable(self) -> Awaitable[None]:
        return self._parked(
            self.tenant.wait_readable if self.tenant.is_crowd else trio.lowlevel.wait_readable
        )

    async def _parked(self, wait: Callable[[socket.socket], Awaitable[None]]) -> None:
        try:
            await wait(self._socket)
        except (trio.ClosedResourceError, OSError) as error:
            raise ConnectionGone("closed here") from error


def _batches(request: rpc.Request) -> int:
    """How many requests its lists cost beside the request itself."""
    elements = 0
    for fields in request.params:
        if isinstance(fields, dict):
            elements += sum(len(item) for item in fields.values() if isinstance(item, list))
    return elements // BATCH


def _too_late() -> WireError:
    return WireError(
        errno.ETIMEDOUT,
        f"the rest of the request did not follow its descriptors within {REST_SECONDS:g} s; send both again",
    )


def _second_request() -> ProtocolViolation:
    return ProtocolViolation(
        errno.EPROTO,
        "a second request was sent before the answer to the first",
        limit="requests_in_flight_per_connection",
    )
