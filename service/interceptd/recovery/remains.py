"""What a predecessor had stored, sorted by the VMM that it belongs to.

Owns the letters of the names in the store, and letting go of what nobody goes on with.
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
    """What has the name of a connection and is none."""

    def let_go(self, closer: Closer) -> None:
        """Close what was not taken. The peers see the end, although the store may have duplicates. The store
        must have no duplicate of the memory any more."""
        for connection in self.connections.values():
            with suppress(OSError):  # it may have hung up
                connection.shutdown(socket.SHUT_RDWR)
        connections = [connection.detach() for connection in self.connections.values()]
        closer.close([*connections, *self.ledgers, *self.memory, *self.unusable])
        self.connections, self.ledgers, self.memory, self.unusable = {}, [], [], []


def sort(kept: Iterable[Kept]) -> Mapping[str, Remains]:
    """By the key of the VMM."""
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
