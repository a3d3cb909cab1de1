"""A client that shares no code with what it tests: the conformance suite's, for the other tests.

Owns nothing; `conformance.wire` does.
"""

from __future__ import annotations

from conformance.wire import (
    EXECUTE,
    READ,
    UNMAPPED_GPA,
    WRITE,
    Connect,
    ConnectionClosed,
    RawConnection,
    Refusal,
    Refused,
    intercept_message,
    pack,
    request,
)

__all__ = [
    "EXECUTE",
    "READ",
    "UNMAPPED_GPA",
    "WRITE",
    "Connect",
    "ConnectionClosed",
    "RawConnection",
    "Refusal",
    "Refused",
    "intercept_message",
    "pack",
    "request",
]
