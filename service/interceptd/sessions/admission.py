"""Who gets as far as a hello that its endpoint serves.

Owns each uid's place in front of that: how many connections it has, how many have not said hello, at what
pace they come; and the count of those that got no welcome. Must not know what a role may do.
"""

from __future__ import annotations

import errno
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from intercept_protocol.errors import EncodedError, ProtocolViolation, WireError
from interceptd.config.live import Settings
from interceptd.connections.connection import Connection
from interceptd.connections.tenants import Tenants
from interceptd.sessions.hello import Endpoint, Handshake, HelloRefused, admit
from interceptd.telemetry.event_bus import Publisher

LEFT: Final = "left"
"""A peer that was gone before its hello was complete."""
REFUSAL_NUMBERS = (
    errno.EACCES, errno.EAGAIN, errno.EBADMSG, errno.EEXIST, errno.EINVAL, errno.EMSGSIZE, errno.ENOSPC,
    errno.EPROTO, errno.EPROTONOSUPPORT, errno.ETIMEDOUT,
)  # fmt: skip
"""What a hello may be answered with (protocol, section 9)."""


class Admission:
    """One for all doors. Each uid has limits of its own, so that none can keep another out."""

    def __init__(self, settings: Settings, event_bus: Publisher) -> None:
        self._settings = settings
        self._event_bus = event_bus
        self.tenants = Tenants(lambda: settings.now.limits)
        self._without_hello: Counter[tuple[Endpoint, int]] = Counter()
        self.refusals: Counter[str] = Counter()
        """Connections that got no welcome, by the error that they were told; `LEFT` is of those that left."""

    @property
    def connections(self) -> int:
        """Of all uids, in any state and any role."""
        return self.tenants.connections

    @property
    def without_hello(self) -> int:
        return self._without_hello.total()

    async def admit(self, connection: Connection, endpoint: Endpoint) -> Handshake:
        """Wait for a hello; raises like `hello.admit`, and for a uid that is at one of its limits."""
        try:
            connection.count()
        except WireError as error:
            self.refusals[error.name] += 1
            raise
        with self._counted(endpoint, connection.peer.uid):
            try:
                await connection.tenant.throttle()  # who comes, is refused and comes again keeps the pace too
                return await admit(connection, endpoint, self._settings.now, self._event_bus)
            except HelloRefused:  # which the reception counts, of all roles
                raise
            except Exception as error:
                self.count_refusal(connection, error.name if isinstance(error, EncodedError) else LEFT)
                raise

    def count_refusal(self, connection: Connection, reason: str) -> None:
        """A connection that waited its turn, and got no welcome, is counted and charged."""
        self.refusals[reason] += 1
        connection.tenant.charge()

    @contextmanager
    def _counted(self, endpoint: Endpoint, uid: int) -> Iterator[None]:
        limit = self._settings.now.limits.connections_without_hello
        queue = (endpoint, uid)
        if self._without_hello[queue] >= limit:
            self.refusals[errno.errorcode[errno.EAGAIN]] += 1
            raise ProtocolViolation(
                errno.EAGAIN,
                f"{limit} connections of uid {uid} have not said hello yet",
                limit="connections_without_hello",
            )
        self._without_hello[queue] += 1
        try:
            yield
        finally:
            self._without_hello[queue] -= 1
            if not self._without_hello[queue]:
                del self._without_hello[queue]
