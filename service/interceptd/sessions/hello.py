"""How a connection comes in: credentials, then a hello that its endpoint serves.

Owns the order of admission and the refusals before a session begins. Must not know what a role may do.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum

import msgspec
import trio

from intercept_protocol import codec, events, messages, rpc
from intercept_protocol.errors import ProtocolViolation, WireError
from intercept_protocol.messages import Hello
from interceptd.config.schema import Config
from interceptd.connections.connection import LAST_LOOK_SECONDS, Connection, ConnectionGone
from interceptd.connections.peer import require_allowed
from interceptd.telemetry.event_bus import Publisher


class Endpoint(Enum):
    """The socket that a connection came in by, and the roles that may."""

    VMM = (messages.HelloVmm, messages.HelloVp, messages.HelloNotifier, messages.HelloHypervisor)
    OPERATOR = (messages.HelloOperator,)


class HelloRefused(ConnectionGone):
    """A hello that was answered with an error, whose name is `reason`."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"its hello was refused: {reason}")
        self.reason = reason


class Handshake(msgspec.Struct, frozen=True):
    """A connection whose hello is fit for its endpoint, and not answered yet."""

    connection: Connection
    hello: Hello
    msgid: int
    event_bus: Publisher

    def hello_reply(self, reply: messages.HelloReply) -> bytes:
        """The bytes that answer the hello."""
        return rpc.encode_result(self.msgid, codec.to_fields(reply))

    @contextmanager
    def refusing(self) -> Iterator[None]:
        """A `WireError` within answers the hello, and ends the connection: a refused hello closes."""
        with _refusing(self.connection, self.msgid, self.event_bus):
            yield


async def admit(
    connection: Connection, endpoint: Endpoint, config: Config, event_bus: Publisher
) -> Handshake:
    """Wait for the hello; bounded by the hello timeout.

    Raises `WireError` or `ProtocolViolation` for a peer that is to be refused under msgid 0, and
    `ConnectionGone` for one that was refused already, or left.
    """
    require_allowed(connection.peer, config.uids, config.allowed_gids, connection.peer_groups)
    request = None
    for patience in (config.timeouts.hello_ms / 1000, LAST_LOOK_SECONDS):
        with trio.move_on_after(patience):
            request = await connection.receive()
            if request is None:
                raise ConnectionGone("closed before its hello")
            break
    if request is None:
        raise ProtocolViolation(errno.ETIMEDOUT, f"no hello within {config.timeouts.hello_ms} ms")
    if request.method != "hello":
        raise ProtocolViolation(errno.EPROTO, f"the first request must be hello, not {request.method!r:.80}")
    with _refusing(connection, request.msgid, event_bus):
        hello = codec.decode_hello(request.params)
        if not isinstance(hello, endpoint.value):
            role = codec.role_of(hello)
            raise WireError(errno.EACCES, f"role {role} is not served on this socket", role=role)
    return Handshake(connection, hello, request.msgid, event_bus)


@contextmanager
def _refusing(connection: Connection, msgid: int, event_bus: Publisher) -> Iterator[None]:
    try:
        yield
    except WireError as error:
        peer = connection.peer
        connection.tenant.log_refusal("hello_refused", error=str(error), pid=peer.pid, uid=peer.uid)
        why = str(error)[: events.ERROR_LENGTH]
        event_bus.publish(events.HelloRefused(error=why, uid=peer.uid, pid=peer.pid))
        connection.refuse(error, msgid)
        raise HelloRefused(error.name) from error
