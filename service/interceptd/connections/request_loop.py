"""The loop of every control connection: decode a call, handle it, send the answer.

Owns encoding typed answers and errors, and how a connection ends. Must not know any method.
"""

from __future__ import annotations

import errno
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from contextlib import AbstractContextManager, nullcontext
from types import TracebackType
from typing import Any, TypeVar

import msgspec
import structlog
import trio

from intercept_protocol import codec, messages, rpc
from intercept_protocol._announcement_codec import AnnouncementRequest
from intercept_protocol.addresses import RangeError
from intercept_protocol.errors import EncodedError, WireError
from intercept_protocol.events import ERROR_LENGTH, ConnectionRefused
from interceptd.connections.connection import Connection, ConnectionGone
from interceptd.connections.refusals import CONNECTION, warn_of_limit
from interceptd.errors import PartitionLost
from interceptd.ledger.journal import Journal
from interceptd.ledger.records import Done
from interceptd.telemetry.event_bus import Publisher

log = structlog.get_logger()
Call = TypeVar("Call", bound=messages.Call[Any])
Reply = msgspec.Struct | None
Handler = Callable[[Call], Reply | Coroutine[object, object, Reply]]
"""Answers a call at once, or by a coroutine that may wait."""
Send = Callable[[bytes], Awaitable[None]]


class CallsInFlight:
    """The calls of several connections that are not answered yet."""

    def __init__(self) -> None:
        self._calls: set[_CallInFlight] = set()

    def one(self) -> AbstractContextManager[None]:
        """One call, until its answer is sent. May be used again for the next one."""
        return _CallInFlight(self._calls)

    async def wait_answered(self) -> None:
        """Block until every call in flight now is answered, or has lost its connection."""
        for answered in [call.answered() for call in self._calls]:
            await answered.wait()


class _CallInFlight:
    """In `calls` while it is in flight. No generator, which would cost a notifier's request 2 us."""

    __slots__ = ("_answered", "_calls")

    def __init__(self, calls: set[_CallInFlight]) -> None:
        self._calls = calls
        self._answered: trio.Event | None = None

    def answered(self) -> trio.Event:
        """Set at the end; created by the first task that waits for it."""
        if self._answered is None:
            self._answered = trio.Event()
        return self._answered

    def __enter__(self) -> None:
        self._calls.add(self)

    def __exit__(self, *_: object) -> None:
        self._calls.remove(self)
        if self._answered is not None:
            self._answered.set()
            self._answered = None


async def serve_calls(
    connection: Connection,
    methods: Mapping[str, type[Call]],
    answer: Handler[Call],
    *,
    send: Send | None = None,
    in_flight: CallsInFlight | None = None,
    journal: Journal | None = None,
    watched: bool = True,
) -> None:
    """Answer calls until the peer closes. A `WireError` or a `RangeError` becomes the answer.

    If the peer closes before its answer, what computes it is cancelled. Where not `watched`, `answer` sees to
    that itself.
    `send` replaces the connection's own where another task sends on it too. A call that was carried out is
    recorded in the `journal` before its answer is sent, so a successor only answers it.
    """
    call = nullcontext() if in_flight is None else in_flight.one()
    while (request := await connection.receive()) is not None:
        with call:
            try:
                reply = await _reply(connection, methods, answer, request, journal, watched=watched)
            finally:
                connection.drop_descriptors()
            if send is None:
                await connection.answer(reply)
            else:
                await connection.answer_watched(send(reply))


class report_and_close:  # lower case: it reads as a verb, `with report_and_close(connection)`
    """End a peer's session: report an error to the peer, the log and the operators, and close the connection.
    Swallows every exception but `PartitionLost`.

    A class, because an abandoned generator (`ExitStack.pop_all`) would close the connection when collected.
    """

    def __init__(self, connection: Connection, event_bus: Publisher) -> None:
        self._connection = connection
        self._event_bus = event_bus

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        peer = self._connection.peer
        match error:
            case EncodedError():
                log.info("connection_refused", error=str(error), **peer.named)
                why = str(error)[:ERROR_LENGTH]
                self._event_bus.publish(ConnectionRefused(error=why, uid=peer.uid, pid=peer.pid))
                warn_of_limit(peer.uid, CONNECTION, error, self._connection.tenant.warnings)
                self._connection.refuse(error)
            case ConnectionGone():
                log.debug("connection_gone", reason=str(error))
            case Exception() if not isinstance(error, PartitionLost):
                log.error("connection_failed", exc_info=error)
        self._connection.close()
        return isinstance(error, Exception) and not isinstance(error, PartitionLost)


async def _reply(
    connection: Connection,
    methods: Mapping[str, type[Call]],
    answer: Handler[Call],
    request: rpc.Request | AnnouncementRequest,
    journal: Journal | None,
    *,
    watched: bool,
) -> bytes:
    if isinstance(request, AnnouncementRequest):
        call: Any = request.call
    else:
        try:
            call = codec.decode_call(methods, request.method, request.params)
        except WireError as error:
            return _refused(connection, request, error)
    try:
        result = answer(call)
        if isinstance(result, Coroutine):  # only an answer that may wait needs the watch
            result = await (connection.answer_watched(result) if watched else result)
    except RangeError as error:
        refusal = WireError(errno.EINVAL, f"{request.method}: {error}", field=error.field)
        return _refused(connection, request, refusal)
    except WireError as error:
        if "list" in error.details:  # says "add[3]", which by itself names nothing
            error = WireError(error.number, f"{request.method}: {error.message}", **error.details)
        return _refused(connection, request, error)
    reply = None if result is None else codec.to_fields(result)
    inbox = connection.inbox
    if journal is not None and inbox is not None and call.RESTART == "logged":
        fields: Any = request.params[0] if request.params else {}
        journal.append(Done(inbox.number, inbox.take_serial(), request.method, fields, reply))
    return rpc.encode_result(request.msgid, reply)


def _refused(connection: Connection, request: rpc.Request | AnnouncementRequest, error: WireError) -> bytes:
    """The error as the answer."""
    connection.tenant.refused(request.method, error)
    return rpc.encode_error(request.msgid, error)
