"""What can go wrong on a connection besides a refusal.

Owns the client's own exception types; must not know trio, sockets or the methods. Of the errors that a call
can raise, `WireError` is an answer and the connection goes on; `ConnectionLost` and `ProtocolViolation` are
for good and every later call raises them again; `ClientMisuse` is a mistake on this side and harms nothing.
"""

from __future__ import annotations

from intercept_protocol.errors import WireError


class ClientMisuse(RuntimeError):
    """The caller broke a rule of the wire or of this library; nothing was sent."""


class ConnectionLost(ConnectionError):
    """The connection is gone, and whether the request in flight was carried out is not known."""


class ConnectionEnded(ConnectionLost):
    """The daemon said, under msgid 0, why it ends the connection; `error` holds its words."""

    def __init__(self, error: WireError) -> None:
        super().__init__(f"the daemon ended the connection: {error}")
        self.error = error
