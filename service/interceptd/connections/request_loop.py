"""The loop that every control connection runs: decode a call, answer it, send.

Owns turning typed answers and errors into bytes, and how a connection ends. Must not know any method.
"""

from __future__ import annotations

import errno
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from types import TracebackType
from typing import TypeVar

import msgspec
import structlog
import trio

from intercept_protocol import codec, rpc
from intercept_protocol.addresses import RangeError
from intercept_protocol.errors import EncodedError, WireError
from intercept_protocol.events import ERROR_LENGTH, ConnectionRefused
from interceptd.connections.connection import Connection, ConnectionGone
from interceptd.errors import PartitionLost
from interceptd.telemetry.event_bus import Publisher

log = structlog.get_logger()
Call = TypeVar("Call")
Reply = msgspec.Struct | None
Answering = Callable[[Call], Reply | Coroutine[object, object, Reply]]
"""Answers a call at once, or by a coroutine that may wait."""
Sending = Callable[[bytes], Awaitable[None]]


class InFlight:
    """The calls of some connections that are not answered yet."""

    def __init__(self) -> None:
        self._over: set[trio.Event] = set()

    @contextmanager
    def one(self) -> Iterator[None]:
        """From a call to the end of its answer."""
        over = trio.Event()
        self._over.add(over)
        try:
            yield
        finally:
            self._over.remove(over)
            over.set()

    async def wait_answered(self) -> None:
        """Block until those that are out now have their answers, or lost their connections."""
        for over in list(self._over):
            await over.wait()


async def serve_calls(
    connection: Connection,
    methods: Mapping[str, type[Call]],
    answer: Answering[Call],
    *,
    send: Sending | None = None,
    in_flight: InFlight | None = None,
) -> None:
    """Answer calls until the peer closes. A `WireError` or a `RangeError` is an answer too.

    `send` is for a connection on which somebody else sends as well.
    """
    while (request := await connection.receive()) is not None:
        with in_flight.one() if in_flight is not None else nullcontext():
            try:
                reply = await _reply(connection, methods, answer, request)
            finally:
                connection.drop_descriptors()
            if send is None:
                await connection.answer(reply)
            else:
                await connection.answer_watched(send(reply))


class report_and_close:  # reads as the verb it is: `with report_and_close(connection)`
    """However the peer's session ends, it is told why if there is a reason, and closed; nobody else notices.
    A lost partition alone goes on up.

    A class, because a generator that is given up (`ExitStack.pop_all`) would close on collection.
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
                self._connection.tenant.log_refusal(
                    "connection_refused", error=str(error), pid=peer.pid, uid=peer.uid
                )
                why = str(error)[:ERROR_LENGTH]
                self._event_bus.publish(ConnectionRefused(error=why, uid=peer.uid, pid=peer.pid))
                self._connection.refuse(error)
            case ConnectionGone():
                log.debug("connection_gone", reason=str(error))
            case Exception() if not isinstance(error, PartitionLost):
                log.error("connection_failed", exc_info=error)
        self._connection.close()
        return isinstance(error, Exception) and not isinstance(error, PartitionLost)


async def _reply(
    connection: Connection, methods: Mapping[str, type[Call]], answer: Answering[Call], request: rpc.Request
) -> bytes:
    try:
        result = answer(codec.decode_call(methods, request.method, request.params))
        if isinstance(result, Coroutine):  # what cannot wait is spared the watch (6 us)
            result = await connection.answer_watched(result)
    except RangeError as error:
        refusal = WireError(errno.EINVAL, f"{request.method}: {error}", field=error.field)
        return rpc.encode_error(request.msgid, refusal)
    except WireError as error:
        return rpc.encode_error(request.msgid, error)
    return rpc.encode_result(request.msgid, None if result is None else codec.to_fields(result))
