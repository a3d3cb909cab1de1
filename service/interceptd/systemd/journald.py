"""The systemd journal's native protocol, without libsystemd: one datagram is one entry.

Owns the encoding, the socket, and the question whether our output goes to the journal. Must not know what is
logged. The protocol: https://systemd.io/JOURNAL_NATIVE_PROTOCOL
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Mapping
from enum import IntEnum
from typing import Final

JOURNAL_SOCKET: Final = "/run/systemd/journal/socket"
MOST_BYTES: Final = 8192
"""Of one value; more is cut, so that an entry fits into a datagram."""
MOST_NAME: Final = 64
"""Characters of a field's name; the journal drops fields whose name is longer or has others."""
_NOT_OF_A_NAME: Final = re.compile(r"[^A-Z0-9_]")


class Priority(IntEnum):
    """Of syslog(3)."""

    CRITICAL = 2
    ERROR = 3
    WARNING = 4
    INFO = 6
    DEBUG = 7

    @property
    def prefix(self) -> str:
        """In front of a line on standard error, sd-daemon(3)."""
        return f"<{self.value}>"


PRIORITIES: Final[Mapping[str, Priority]] = {
    "critical": Priority.CRITICAL,
    "error": Priority.ERROR,
    "exception": Priority.ERROR,
    "warning": Priority.WARNING,
    "info": Priority.INFO,
    "debug": Priority.DEBUG,
}
"""By the method that logs."""


def is_journal(environment: Mapping[str, str], descriptor: int) -> bool:
    """Whether a descriptor is the stream to the journal that a service manager has set up ($JOURNAL_STREAM,
    systemd.exec(5))."""
    try:
        status = os.fstat(descriptor)
    except OSError:
        return False
    return environment.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"


def field_name(prefix: str, key: str) -> str:
    """The name of a field of the journal: upper case, with no characters that it would refuse."""
    return _NOT_OF_A_NAME.sub("_", f"{prefix}{key}".upper())[:MOST_NAME]


def encode(fields: Mapping[str, str]) -> bytes:
    """An entry. A value with a newline is written with its length, so no value can add a field."""
    parts = []
    for name, value in fields.items():
        data = value.encode(errors="backslashreplace")
        if len(data) > MOST_BYTES:
            data = data[:MOST_BYTES].decode(errors="ignore").encode()  # no half of a character
        if b"\n" in data:
            parts.append(b"%s\n%s%s\n" % (name.encode(), len(data).to_bytes(8, "little"), data))
        else:
            parts.append(b"%s=%s\n" % (name.encode(), data))
    return b"".join(parts)


class Unreachable(Exception):
    """No journal listens: it is restarting, or is not there."""


class Journal:
    """A socket to the journal, which may come and go meanwhile. `send` never blocks."""

    def __init__(self, path: str = JOURNAL_SOCKET) -> None:
        self._path = path
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)

    def send(self, entry: bytes) -> bool:
        """Whether the journal took it; it may have no room. Raises `Unreachable`."""
        try:
            self._socket.sendto(entry, self._path)
        except (BlockingIOError, InterruptedError):
            return False
        except OSError as error:
            raise Unreachable from error
        return True

    def close(self) -> None:
        self._socket.close()
