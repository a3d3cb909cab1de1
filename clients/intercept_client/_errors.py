"""What can go wrong on a connection besides a refusal.

Owns the client's own exception types; must not know trio, sockets or the methods. Of the errors that a call
can raise, `WireError` is an answer, after which the connection goes on. `ConnectionLost` and
`ProtocolViolation` end the connection, and every later call raises them again. `ClientMisuse` is a mistake of
the caller and does no harm.
"""

from __future__ import annotations

from typing import Final

from intercept_protocol.errors import ProtocolViolation, WireError


class ClientMisuse(RuntimeError):
    """The caller broke a rule of the wire or of this library; nothing was sent."""


class ConnectionLost(ConnectionError):
    """The connection is gone. Whether the daemon carried out the request in flight is unknown."""


class ConnectionEnded(ConnectionLost):
    """The daemon ended the connection, and said why: `error` holds its last words (msgid 0 on the wire)."""

    def __init__(self, error: WireError) -> None:
        super().__init__(f"the daemon ended the connection: {error}")
        self.error = error


FATAL: Final = (ConnectionLost, ProtocolViolation)
"""After one of these the connection is over."""
