"""How a connection comes in: its uid's limits, its credentials, then a hello that its endpoint serves.

Owns the order of admission, how many connections have not said hello, and the count of refusals. Must not
know what a role may do.
"""

from __future__ import annotations

import errno
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from typing import Final

import msgspec
import structlog
import trio

from intercept_protocol import codec, events, messages, rpc
from intercept_protocol.errors import EncodedError, ProtocolViolation, WireError
from intercept_protocol.messages import Hello
from interceptd.config.live import Settings
from interceptd.config.schema import Config
from interceptd.connections.connection import LAST_LOOK_SECONDS, Connection, ConnectionGone
from interceptd.connections.peer import require_allowed
from interceptd.connections.tenants import Tenants
from interceptd.descriptor_reserve import kept_from_newcomers
from interceptd.memory_budget import MemoryBudget
from interceptd.scheduling.time_share import TimeShares
from interceptd.telemetry.event_bus import Publisher

log = structlog.get_logger()

LEFT: Final = "left"
"""The peer left before its hello was complete."""
ONE_AT_A_TIME: Final = (messages.HelloVp, messages.HelloHypervisor)
"""The roles that may not send a request before the last one is answered."""
REFUSAL_NUMBERS = (
    errno.EACCES, errno.EAGAIN, errno.EBADMSG, errno.EEXIST, errno.EINVAL, errno.EMFILE, errno.EMSGSIZE,
    errno.ENOSPC,
    errno.EPROTO, errno.EPROTONOSUPPORT, errno.ETIMEDOUT,
)  # fmt: skip
"""The errors that can end a connection before its hello is welcomed (protocol, section 9)."""


class Endpoint(Enum):
    """The socket that a connection was accepted on, and the roles that it serves."""

    VMM = (messages.HelloVmm, messages.HelloVp, messages.HelloNotifier, messages.HelloHypervisor)
    OPERATOR = (messages.HelloOperator,)


class HelloRefused(ConnectionGone):
    """A hello that was answered with an error, whose name is `reason`."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"its hello was refused: {reason}")
        self.reason = reason


class Handshake(msgspec.Struct, frozen=True):
    """A connection whose hello is valid on its endpoint, and not answered yet."""

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


class Admission:
    """One for both sockets. Limits are per uid, so that no uid can keep another out."""

    def __init__(
        self, settings: Settings, event_bus: Publisher, turns: TimeShares, memory: MemoryBudget
    ) -> None:
        self._settings = settings
        self._event_bus = event_bus
        self.tenants = Tenants(lambda: settings.now.limits, turns, memory)
        self._without_hello: Counter[tuple[Endpoint, int]] = Counter()
        self.refusals: Counter[str] = Counter()
        """Rejected connections, by the error that they were sent; `LEFT` counts those that left."""

    @property
    def connections(self) -> int:
        """Of all uids, in any state and any role."""
        return self.tenants.connections

    @property
    def without_hello(self) -> int:
        return self._without_hello.total()

    async def admit(self, connection: Connection, endpoint: Endpoint) -> Handshake:
        """Wait for the hello; bounded by the hello timeout.

        Raises `WireError` or `ProtocolViolation` for a peer that must be refused under msgid 0 (its uid may
        be at a limit), and `ConnectionGone` for one that was refused already, or left.
        """
        if endpoint is Endpoint.VMM and kept_from_newcomers(connection.descriptor):
            self.refusals[errno.errorcode[errno.EMFILE]] += 1
            raise ProtocolViolation(
                errno.EMFILE,
                "the daemon has no descriptor left for another connection of a VMM; try again later",
            )
        with self._counting_refusals():
            connection.count()
        with self._counted(endpoint, connection):
            try:
                await connection.tenant.throttle()  # also for one that reconnects after each refusal
                return await _receive_hello(connection, endpoint, self._settings.now, self._event_bus)
            except HelloRefused:  # counted by the dispatcher, for all roles
                raise
            except Exception as error:
                self.count_refusal(connection, error.name if isinstance(error, EncodedError) else LEFT)
                raise

    def count_refusal(self, connection: Connection, reason: str) -> None:
        """Count a rejected connection, and charge its uid for it."""
        self.refusals[reason] += 1
        connection.tenant.charge()

    @contextmanager
    def _counting_refusals(self) -> Iterator[None]:
        try:
            yield
        except EncodedError as error:
            self.refusals[error.name] += 1
            raise

    @contextmanager
    def _counted(self, endpoint: Endpoint, connection: Connection) -> Iterator[None]:
        limit = self._settings.now.limits.connections_without_hello
        uid, hellos = connection.peer.uid, connection.tenant.hellos
        queue = (endpoint, uid)
        if self._without_hello[queue] >= limit:
            self.refusals[errno.errorcode[errno.EAGAIN]] += 1
            raise ProtocolViolation(
                errno.EAGAIN,
                f"{limit} connections of uid {uid} have not said hello yet",
                limit="connections_without_hello",
            )
        with self._counting_refusals():
            hellos.acquire()
        self._without_hello[queue] += 1
        try:
            yield
        finally:
            hellos.release()
            self._without_hello[queue] -= 1
            if not self._without_hello[queue]:
                del self._without_hello[queue]


async def _receive_hello(
    connection: Connection, endpoint: Endpoint, config: Config, event_bus: Publisher
) -> Handshake:
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
    connection.drop_descriptors()
    if request.method != "hello":
        raise ProtocolViolation(errno.EPROTO, f"the first request must be hello, not {request.method!r:.80}")
    with _refusing(connection, request.msgid, event_bus):
        hello = codec.decode_hello(request.params)
        if not isinstance(hello, endpoint.value):
            role = codec.role_of(hello)
            raise WireError(errno.EACCES, f"role {role} is not served on this socket", role=role)
    if isinstance(hello, ONE_AT_A_TIME):
        connection.forbid_pipelining()
    return Handshake(connection, hello, request.msgid, event_bus)


@contextmanager
def _refusing(connection: Connection, msgid: int, event_bus: Publisher) -> Iterator[None]:
    try:
        yield
    except WireError as error:
        peer = connection.peer
        log.info("hello_refused", error=str(error))
        why = str(error)[: events.ERROR_LENGTH]
        event_bus.publish(events.HelloRefused(error=why, uid=peer.uid, pid=peer.pid))
        connection.tenant.refused("hello", error)
        connection.refuse(error, msgid)
        raise HelloRefused(error.name) from error
