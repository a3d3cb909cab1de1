"""One connection's conversation, without any I/O.

Owns msgids, the request in flight, the bytes still to be sent, and the end of the conversation; must not know
sockets, clocks, trio or threads. A shell does, until nothing is in flight: send `data_to_send` and report
`sent`, or when there is none, receive and hand it to `receive_data`.

A caller may abandon its request at any point (a cancellation, a timeout): the exchange stays in flight, the
next caller's shell finishes it first, and its answer reaches no other caller. So requests and answers never
get out of step, and two requests are never in flight.
"""

from __future__ import annotations

import errno
from collections import deque
from collections.abc import Sequence
from typing import Final

from intercept_protocol import rpc
from intercept_protocol._frames import MESSAGE_LIMIT, REQUEST_VALUES_VMM, FrameScanner
from intercept_protocol.errors import ProtocolViolation, WireError
from intercept_protocol.events import EVENT_METHOD, Event, decode_event
from intercept_protocol.text import sentence

from ._errors import ClientMisuse, ConnectionEnded, ConnectionLost
from ._exchange import RESPONSE_HEAD, Exchange, Progress, Reply

NOTIFICATION_LIMIT: Final = 1024
"""Notifications kept for `take_notifications`; beyond it the oldest are dropped and counted."""
_LAST_MSGID: Final = 0x7F
"""Msgids go from 1 to 127, and begin again: they take one byte. A daemon repeats no answer but the last of a
connection (T-12), so even two would do. It says its last words under 0."""


class ClientSession:
    """The client's side of one connection. Not thread-safe: a shell's lock covers it."""

    __slots__ = (
        "_dropped", "_has_wrapped", "_in_flight", "_loss", "_msgid", "_notifications", "_receiver",
        "_sent", "_unsent",
    )  # fmt: skip

    def __init__(self) -> None:
        self._receiver = rpc.Receiver({rpc.RESPONSE, rpc.NOTIFICATION})
        self._notifications: deque[rpc.Notification] = deque(maxlen=NOTIFICATION_LIMIT)
        self._dropped = 0
        self._msgid = 0
        """Of the last request."""
        self._has_wrapped = False
        """Whether the msgids began again: all were used."""
        self._in_flight: Exchange[object] | None = None
        self._unsent = b""
        self._sent = 0
        self._loss: ConnectionLost | ProtocolViolation | None = None

    @property
    def is_busy(self) -> bool:
        """Whether an answer is owed."""
        return self._in_flight is not None

    @property
    def is_lost(self) -> bool:
        """Whether the conversation is over; the shell should close its socket."""
        return self._loss is not None

    @property
    def dropped_notifications(self) -> int:
        return self._dropped

    # ------------------------------------------------------------ our side

    def start(self, exchange: Exchange[Reply]) -> None:
        """Put a request in flight.

        Raises the error that ended the conversation if it is over, and `ClientMisuse` for a second request
        before the answer, an exchange that was used before, or a request that is too large.
        """
        self.require_going_on()
        if self._in_flight is not None:
            raise ClientMisuse(
                f"{exchange.method}: {self._in_flight.method} is in flight, and requests take turns"
            )
        if exchange.progress is not Progress.NEW:
            raise ClientMisuse(f"{exchange.method}: runs once, and this one: {exchange.progress.value}")
        if self._msgid == _LAST_MSGID:
            self._msgid, self._has_wrapped = 0, True
        self._unsent = _encode(self._msgid + 1, exchange)
        self._msgid += 1
        self._sent = 0
        exchange.advance(Progress.IN_FLIGHT)
        self._in_flight = exchange  # type: ignore[assignment]  # read only through its own decode

    def data_to_send(self) -> bytes:
        """What remains to be sent of the request in flight; empty once an answer is awaited."""
        return self._unsent

    def descriptors_to_send(self) -> Sequence[int]:
        """What accompanies `data_to_send`: nothing once its first byte was sent."""
        return () if self._sent or self._in_flight is None else self._in_flight.descriptors

    def sent(self, count: int) -> None:
        """The first `count` bytes of `data_to_send` were sent."""
        self._unsent = self._unsent[count:]
        self._sent += count

    def withdraw_unsent(self) -> None:
        """Take back the request in flight if none of its bytes was sent; otherwise its answer stays owed."""
        if self._in_flight is not None and not self._sent:
            self._in_flight.advance(Progress.WITHDRAWN)
            self._in_flight = None
            self._unsent = b""
            self._msgid -= 1  # never asked

    def lose(self, reason: str) -> None:
        """End the conversation from this side."""
        self._lose(ConnectionLost(reason))

    # ------------------------------------------------------------ the daemon's side

    def receive_data(self, data: bytes) -> None:
        """Take in what the daemon sent; empty means that it closed the connection.

        Never raises: the exchange does.
        """
        if self._is_known_answer(data):
            return
        if not data:
            where = " in the middle of a message" if self._receiver.has_bytes else ""
            self.lose(f"the connection ended{where}")
        self._receiver.receive_data(data)
        try:
            while self._loss is None and (message := self._receiver.next_message()) is not None:
                self._handle(message)
        except ProtocolViolation as violation:
            self._lose(violation)

    def stream_failed(self, error: OSError) -> None:
        """A send or a receive failed.

        If the daemon closed the connection before it read the request, its last words may still be readable.
        """
        if self._unsent and isinstance(error, BrokenPipeError | ConnectionResetError):
            self._unsent = b""
        else:
            self.lose(f"the connection failed: {sentence(error)}")

    def require_going_on(self) -> None:
        """Raise the error that ended the conversation, if it is over."""
        if self._loss is not None:
            raise self._loss

    def take_notifications(self) -> list[rpc.Notification]:
        """Remove and return the notifications that came so far, oldest first."""
        taken = list(self._notifications)
        self._notifications.clear()
        return taken

    def take_events(self) -> list[Event]:
        """The events among those notifications, without those that only a later version knows.

        Raises `ProtocolViolation` for a malformed event; the conversation is then over.
        """
        try:
            told = [
                decode_event(notification.params)
                for notification in self.take_notifications()
                if notification.method == EVENT_METHOD
            ]
        except ProtocolViolation as violation:
            self._lose(violation)
            raise
        return [event for event in told if event is not None]

    def _is_known_answer(self, data: bytes) -> bool:
        """The hot path: exactly the answer to the request in flight, in a form that needs no decoding."""
        exchange = self._in_flight
        if exchange is None or exchange.known is None or self._unsent or self._receiver.has_bytes:
            return False
        answer = data[RESPONSE_HEAD:]
        if answer not in exchange.known or data[:RESPONSE_HEAD] != bytes((0x94, rpc.RESPONSE, self._msgid)):
            return False
        self._in_flight = None
        exchange.answer(exchange.known[answer])
        return True

    def _handle(self, message: rpc.Message) -> None:
        match message:
            case rpc.Notification():
                self._dropped += len(self._notifications) == NOTIFICATION_LIMIT
                self._notifications.append(message)
            case rpc.Response(msgid=0, error=error) if error is not None:
                self._lose(ConnectionEnded(WireError.from_any(error)))
            case rpc.Response(msgid=msgid, error=error, result=result):
                if (exchange := self._answered(msgid)) is not None:
                    self._complete(exchange, error, result)

    def _answered(self, msgid: int) -> Exchange[object] | None:
        """The request in flight if that was answered; None if an earlier one was, again (T-12)."""
        exchange = self._in_flight
        if exchange is None or msgid != self._msgid:
            if 0 < msgid <= (_LAST_MSGID if self._has_wrapped else self._msgid):
                return None
        elif not self._unsent:
            return exchange
        raise ProtocolViolation(errno.EBADMSG, f"an answer under msgid {msgid}, which was not asked")

    def _complete(self, exchange: Exchange[object], error: object, result: object) -> None:
        if error is not None:
            exchange.fail(Progress.REFUSED, WireError.from_wire(error))
        else:
            exchange.answer(exchange.decode(result))
        self._in_flight = None

    def _lose(self, loss: ConnectionLost | ProtocolViolation) -> None:
        if self._loss is not None:
            return
        self._loss = loss
        self._unsent = b""
        if self._in_flight is not None:
            self._in_flight.fail(Progress.LOST, loss)
            self._in_flight = None


def _encode(msgid: int, exchange: Exchange[Reply]) -> bytes:
    try:
        data = rpc.encode_request(msgid, exchange.method, exchange.params)
    except (OverflowError, TypeError, ValueError) as error:
        raise ClientMisuse(f"{exchange.method}: cannot be encoded: {error}") from error
    if len(data) > MESSAGE_LIMIT:
        raise ClientMisuse(f"{exchange.method}: {len(data)} bytes; a message may have {MESSAGE_LIMIT}")
    if len(data) > REQUEST_VALUES_VMM.values:  # each takes a byte
        try:
            FrameScanner(REQUEST_VALUES_VMM).scan(data)
        except ProtocolViolation as violation:  # the daemon would end the connection
            raise ClientMisuse(f"{exchange.method}: {violation.message}") from violation
    return data
