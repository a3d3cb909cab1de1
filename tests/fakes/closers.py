"""A closer for what a test hands over, and what it shows of its work.

Owns the quota behind it. A peer `hung_up` once all copies of the other end of its pair are closed.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from fakes.eventually import PATIENCE
from interceptd.connections.closer import Closer
from interceptd.quota import Quota


def unclosed(limit: int) -> Quota:
    """The count of a uid that may have `limit` unclosed descriptors."""
    return Quota(7, "unclosed descriptors", "unclosed_descriptors_per_uid", lambda: limit)


def closer(limit: int = 1 << 20) -> Closer:
    return Closer(unclosed(limit))


def closing_threads() -> int:
    """Of all closers in this process."""
    return sum(thread.name == "close descriptors" for thread in threading.enumerate())


@contextmanager
def watched_descriptor() -> Iterator[tuple[socket.socket, int]]:
    """A peer, and the descriptor of the other end, which someone else closes."""
    ours, theirs = socket.socketpair()
    with ours:
        ours.settimeout(PATIENCE)
        yield ours, theirs.detach()


def hung_up(peer: socket.socket) -> bool:
    """Wait until the other end is closed."""
    return peer.recv(1) == b""
