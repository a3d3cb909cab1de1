"""The descriptors that a predecessor stored, sorted by VMM.

Owns the letters of their names, and closing those that are not used.
"""

from __future__ import annotations

import socket
from collections import defaultdict
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import chain

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
    listeners: list[socket.socket] = field(default_factory=list)
    images: list[int] = field(default_factory=list)
    page_lists: list[int] = field(default_factory=list)
    """The last three are of a restore."""
    unusable: list[int] = field(default_factory=list)
    """Descriptors with the name of a socket that are none."""

    def let_go(self, closer: Closer) -> None:
        """Close what was not taken. Connections are shut down first: the store may have duplicates of them.
        It must have none of the memory. Listeners are not: another restore may be asked with them."""
        for connection in self.connections.values():
            with suppress(OSError):  # it may have hung up
                connection.shutdown(socket.SHUT_RDWR)
        sockets = [each.detach() for each in (*self.connections.values(), *self.listeners)]
        files = (self.ledgers, self.memory, self.images, self.page_lists, self.unusable)
        closer.close([*sockets, *chain.from_iterable(files)])
        self.connections, self.listeners = {}, []
        for each in files:
            each.clear()


def sort(kept: Iterable[Kept]) -> Mapping[str, Remains]:
    """By key of the VMM."""
    found: defaultdict[str, Remains] = defaultdict(Remains)
    for name, descriptor in kept:
        letter, key = name[0], name[1:]
        match letter:
            case "p":
                found[key].ledgers.append(descriptor)
            case "c":
                if (connection := _socket(descriptor)) is not None:
                    found[key].connections[cookie_of(connection)] = connection
                else:
                    found[key].unusable.append(descriptor)
            case "m":
                found[key].memory.append(descriptor)
            case "l":
                if (listener := _socket(descriptor)) is not None:
                    found[key].listeners.append(listener)
                else:
                    found[key].unusable.append(descriptor)
            case "i":
                found[key].images.append(descriptor)
            case "f":
                found[key].page_lists.append(descriptor)
    return found


def _socket(descriptor: int) -> socket.socket | None:
    try:
        return socket.socket(fileno=descriptor)
    except OSError:
        return None
