"""Takes requests out of a socket one at a time, and not a byte of the next: its descriptors would come along.

Owns how far to read: it looks (MSG_PEEK) for the request's end. Must not know methods, and never blocks.

The kernel attaches descriptors to the bytes that were sent with them (SCM_RIGHTS, unix(7)): they come with
the first of these that is read.
"""

from __future__ import annotations

import socket
from time import perf_counter_ns

from intercept_protocol import rpc
from interceptd.connections.received_fds import ReceivedFds

LOOK_BYTES = 4096
"""Bytes per look: fifteen intercepts, or any usual control message."""
LONG_LOOK_NS = 500_000
"""A look goes through all that is unread, up to the first descriptors, however little it returns. It takes
0.2 us for each send(2) of the peer, and there may be very many if the peer's buffer is large (SO_SNDBUF)."""


class RequestReader:
    """Of one connection."""

    __slots__ = ("_may_look", "_source")

    def __init__(self, source: socket.socket) -> None:
        self._source = source
        self._may_look = True
        """Whether the queue is not known to be long."""

    def read(self, receiver: rpc.Receiver, descriptors: ReceivedFds) -> rpc.Request | None:
        """Read what has arrived of a request, with its descriptors; None while the rest is missing.

        Raises `BlockingIOError` if nothing has arrived, `EOFError` if the peer has closed, `OSError`, and
        `ProtocolViolation`. Cheapest if the request is all that has arrived, in one piece.
        """
        if not self._may_look:
            return self._read_without_look(receiver, descriptors)
        began = perf_counter_ns()
        data = self._source.recv(LOOK_BYTES, socket.MSG_PEEK)
        self._may_look = perf_counter_ns() - began <= LONG_LOOK_NS
        request = _decoded(receiver, data)
        unread = len(data)
        if request is not None:
            unread -= receiver.drop_rest()
        while unread:
            unread -= len(descriptors.receive(self._source, unread))
        return request

    def _read_without_look(self, receiver: rpc.Receiver, descriptors: ReceivedFds) -> rpc.Request | None:
        """Read what the request has at least: a few bytes, several times for one request."""
        try:
            return _decoded(receiver, descriptors.receive(self._source, receiver.missing_bytes))
        except BlockingIOError:
            self._may_look = True  # all was read
            raise


def _decoded(receiver: rpc.Receiver, data: bytes) -> rpc.Request | None:
    if not data:
        raise EOFError
    receiver.receive_data(data)
    message = receiver.next_message()
    assert isinstance(message, rpc.Request | None), "the receiver accepts nothing else"
    return message
