"""A systemd journal: what was sent to its socket, by the native protocol.

Owns the socket and the reading of entries (https://systemd.io/JOURNAL_NATIVE_PROTOCOL). Must not import the
daemon.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ENTRY_BYTES = 1 << 20


class FakeJournal:
    def __init__(self, listener: socket.socket) -> None:
        self._listener = listener

    def take(self) -> bytes:
        """The next entry as it was sent; `BlockingIOError` without one."""
        return self._listener.recv(ENTRY_BYTES)

    def entry(self) -> dict[str, str]:
        """The fields of the next entry."""
        return parse(self.take())


@contextmanager
def fake_journal(path: Path) -> Iterator[FakeJournal]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as listener:
        listener.bind(str(path))
        yield FakeJournal(listener)


def parse(data: bytes) -> dict[str, str]:
    """As the journal reads it: `NAME=value`, or `NAME`, a length of 8 bytes, and so many bytes."""
    fields: dict[str, str] = {}
    while data:
        line, _, rest = data.partition(b"\n")
        name, equals, value = line.partition(b"=")
        if not equals:
            length = int.from_bytes(rest[:8], "little")
            value, rest = rest[8 : 8 + length], rest[8 + length :]
            assert rest[:1] == b"\n", "a value ends with a newline"
            rest = rest[1:]
        assert name.decode() not in fields, "each field once"
        fields[name.decode()] = value.decode()
        data = rest
    return fields
