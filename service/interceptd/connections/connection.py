"""One accepted connection: requests in, answers out, one at a time.

Owns the socket, the receive buffer and the rule of one request in flight. Must not know roles or methods.
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
from intercept_protocol._frames import REQUEST_VALUES
from intercept_protocol.errors import EncodedError, ProtocolViolation, WireError
from intercept_protocol.text import sentence
from interceptd.connections.fairness import ALONE, TURN, Turns
from interceptd.connections.hangup_watch import PeerWatch
from interceptd.connections.peer import Peer, Pidfd, peer_groups
from interceptd.connections.received_fds import ReceivedFds
from interceptd.connections.tenants import Tenants

RECEIVE_BYTES = 4096
"""A read: fifteen intercepts, and any control message in one go."""
REST_SECONDS = 5.0
"""For the rest of a request whose descriptors are here, which is usually sent with its first byte."""
LAST_LOOK_SECONDS = 0.1
"""Beyond a peer's deadline, for what it has sent and we have not looked at: who stopped us for a while (a
signal, a debugger, a suspended machine) must not cost our peers anything."""
_HOT_PATH = Turns()
"""Of all VPs of all partitions: they share one event loop."""


class ConnectionGone(Exception):
    """The peer closed, or the connection broke."""


Whole = TypeVar("Whole")
Answered = TypeVar("Answered")


class Connection:
    """A stream of requests from one peer. `receive` and `answer_watched` are for one task only."""

    def __init__(self, accepted: socket.socket, tenants: Tenants, watch: PeerWatch) -> None:
        accepted.setblocking(False)
        self.peer = Peer.of(accepted)
        self.tenant = tenants.of(self.peer.uid)
        self.tenant.connections += 1
        self._socket = accepted
        self._watch = watch
        self._receiver = rpc.Receiver({rpc.REQUEST}, REQUEST_VALUES)
        self._turn = 0
        self._unpaid: rpc.Request | None = None
        """What was received, and had not its turn yet."""
        self._descriptors = ReceivedFds(0)
        self._rest_due: float | None = None
        """Until when the descriptors of half a request are kept."""

    def peer_groups(self) -> frozenset[int]:
        return peer_groups(self._socket)

    def peer_pidfd(self) -> Pidfd | None:
        """A handle on the process that connected; the caller closes it."""
        return Pidfd.of(self._socket)

    def box_descriptors(self) -> ReceivedFds:
        """Keep descriptors from now on. Without it those that a peer sends are closed."""
        self._descriptors = ReceivedFds()
        return self._descriptors

    def drop_descriptors(self) -> None:
        """Close what came with the last request and was not taken."""
        self._rest_due = None
        self._descriptors.drop()

    def close(self) -> None:
        """Close at once; idempotent. A task parked on the socket is woken with `ConnectionGone`.

        Nothing is left unread: that would reset the connection, and the peer find ECONNRESET where our error
        should be.
        """
        if self._socket.fileno() >= 0:
            trio.lowlevel.notify_closing(self._socket)
            self._descriptors.drain(self._socket)
            self._socket.close()
            self.tenant.connections -= 1

    async def receive(self) -> rpc.Request | None:
        """The next request, when its uid's pace allows; None when the peer has closed. Raises
        `ProtocolViolation`, `ConnectionGone`. Who gives up may ask again: nothing is lost."""
        if self._unpaid is None:
            self._unpaid = await self._receive()
        if self._unpaid is not None:
            await self.tenant.throttle()
        request, self._unpaid = self._unpaid, None
        return request

    async def _receive(self) -> rpc.Request | None:
        self._turn += 1
        if self._turn >= TURN:
            self._turn = 0
            await trio.lowlevel.checkpoint()
        message = await self._next_message()
        assert isinstance(message, rpc.Request | None), "the receiver accepts nothing else"
        if message is not None and self._receiver.has_bytes:
            raise _second_request()
        return message

    async def receive_whole(self, recognise: Callable[[bytes], Whole | None]) -> Whole | rpc.Request | None:
        """Like `receive`, for the hot path: what `recognise` makes of one whole read is taken as it is.

        While no other VP is busy, the CPU is yielded once before the task is parked: a peer on the
        same CPU then often has its next message ready, and the round by way of epoll (15 us) is saved.
        No pace is kept: intercepts are bounded by one in flight.
        """
        running = _HOT_PATH.running(self)
        may_yield = running > ALONE
        if not may_yield or not running % TURN:
            await trio.lowlevel.checkpoint()
        if self._receiver.has_bytes:
            return await self._receive()
        while True:
            try:
                data = self._descriptors.receive(self._socket, RECEIVE_BYTES)
                break
            except BlockingIOError:
                if may_yield:
                    may_yield = False
                    os.sched_yield()
                else:
                    await self._parked(trio.lowlevel.wait_readable)
            except OSError as error:
                raise ConnectionGone(sentence(error)) from error
        whole = recognise(data)
        if whole is not None:
            return whole
        if not data:
            return None
        self._receiver.receive_data(data)
        return await self._receive()

    def expect_responses(self) -> None:
        """From now on we ask and the peer answers."""
        self._receiver = rpc.Receiver({rpc.RESPONSE}, REQUEST_VALUES)

    async def receive_response(self) -> rpc.Response | None:
        """The next answer of the peer, None when it has closed. Raises like `receive`."""
        message = await self._next_message()
        assert isinstance(message, rpc.Response | None), "the receiver accepts nothing else"
        return message

    async def send(self, data: bytes) -> None:
        """Send a message; blocks while the peer does not read. Raises `ConnectionGone`."""
        while data := self._send_now(data):
            await self._parked(trio.lowlevel.wait_writable)

    async def answer(self, data: bytes) -> None:
        """Send an answer; blocks while the peer does not read, unless it speaks or leaves. Raises
        `ConnectionGone`, `ProtocolViolation`.

        What it says then nobody would read, its own end of this connection included, which would keep that
        open after its death.
        """
        if rest := self._send_now(data):
            await self.answer_watched(self.send(rest))

    async def answer_watched(self, answering: Awaitable[Answered]) -> Answered:
        """Await `answering`, and give it up when the peer closes or breaks the rule meanwhile."""
        with trio.CancelScope() as wait:
            self._watch.add(descriptor := self._socket.fileno(), wait)
            try:
                return await answering
            finally:
                self._watch.remove(descriptor)
        raise ConnectionGone("closed before the answer") if self._peek() == b"" else _second_request()

    def refuse(self, error: EncodedError, msgid: int = 0) -> None:
        """Tell the peer why its connection ends: under msgid 0 unless a request of its own is answered. Never
        blocks; close it afterwards."""
        with suppress(OSError):  # it is gone, or does not read: there is nobody to tell
            self._socket.send(rpc.encode_error(msgid, error), socket.MSG_NOSIGNAL)

    async def _next_message(self) -> rpc.Message | None:
        while (message := self._receiver.next_message()) is None:
            if self._receiver.has_bytes:
                await trio.lowlevel.checkpoint()  # scanning a long message takes its time
            data = await self._read()
            if not data:
                return None
            self._receiver.receive_data(data)
        return message

    async def _read(self) -> bytes:
        while True:
            try:
                return self._descriptors.receive(self._socket, RECEIVE_BYTES)
            except BlockingIOError:
                await self._wait_readable()
            except OSError as error:
                raise ConnectionGone(sentence(error)) from error

    async def _wait_readable(self) -> None:
        """Wait for more bytes; but descriptors that wait for the rest of their request are closed in time.

        One of them may be the peer's own end of this connection: while we hold that, we would wait for a peer
        that is gone.
        """
        if not self._descriptors.holds_any:
            await self._parked(trio.lowlevel.wait_readable)
            return
        if self._rest_due is None:
            self._rest_due = trio.current_time() + REST_SECONDS
        with trio.move_on_at(self._rest_due) as patience:
            await self._parked(trio.lowlevel.wait_readable)
        if patience.cancelled_caught:
            self._descriptors.lose(_too_late())

    def _send_now(self, data: bytes) -> bytes:
        """Send what goes without waiting; returns the rest."""
        try:
            return data[self._socket.send(data, socket.MSG_NOSIGNAL) :]
        except BlockingIOError:
            return data
        except OSError as error:
            raise ConnectionGone(sentence(error)) from error

    async def _parked(self, wait: Callable[[socket.socket], Awaitable[None]]) -> None:
        try:
            await wait(self._socket)
        except (trio.ClosedResourceError, OSError) as error:
            raise ConnectionGone("closed here") from error

    def _peek(self) -> bytes:
        try:
            return self._socket.recv(1, socket.MSG_PEEK)
        except OSError:
            return b""


def _too_late() -> WireError:
    return WireError(
        errno.ETIMEDOUT,
        f"the rest of the request did not follow its descriptors within {REST_SECONDS:g} s: send them again",
    )


def _second_request() -> ProtocolViolation:
    return ProtocolViolation(
        errno.EPROTO,
        "a second request came before the answer to the first",
        limit="requests_in_flight_per_connection",
    )
