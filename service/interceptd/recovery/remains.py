"""The descriptors that a predecessor stored, sorted by VMM.

Owns the letters of their names, and closing those that are not used.
"""

from __future__ import annotations

import socket
from collections import defaultdict
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field

from interceptd.connections.closer import Closer
from interceptd.connections.socket_cookie import cookie_of
from interceptd.systemd.socket_activation import Kept


@dataclass
class Remains:
    """Of one VMM. Owns the descriptors."""

    ledgers: list[int] = field(default_factory=list)
    connections: dict[int, socket.socket] = field(default_factory=dict)
    """By cookie."""
    memory: list[int] = field(default_factory=list)
    unusable: list[int] = field(default_factory=list)
    """Descriptors with the name of a connection that are not sockets."""

    def let_go(self, closer: Closer) -> None:
        """Close what was not taken. Connections are shut down first: the store may have duplicates of them.
        It must have none of the memory."""
        for connection in self.connections.values():
            with suppress(OSError):  # it may have hung up
                connection.shutdown(socket.SHUT_RDWR)
        connections = [connection.detach() for connection in self.connections.values()]
        closer.close([*connections, *self.ledgers, *self.memory, *self.unusable])
        self.connections, self.ledgers, self.memory, self.unusable = {}, [], [], []


def sort(kept: Iterable[Kept]) -> Mapping[str, Remains]:
    """By key of the VMM."""
    found: defaultdict[str, Remains] = defaultdict(Remains)
    for name, descriptor in kept:
        letter, key = name[0], name[1:]
        match letter:
            case "p":
                found[key].ledgers.append(descriptor)
            case "c":
                try:
                    connection = socket.socket(fileno=descriptor)
                except OSError:
                    found[key].unusable.append(descriptor)
                else:
                    found[key].connections[cookie_of(connection)] = connection
            case "m":
                found[key].memory.append(descriptor)
    return found
