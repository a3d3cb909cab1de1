"""Takes messages out of a socket one at a time, and not a byte of the next: its descriptors would come along.

Owns how far to read: it looks (MSG_PEEK) for the message's end. Must not know methods, and never blocks.

The kernel attaches descriptors to the bytes that were sent with them (SCM_RIGHTS, unix(7)): they come with
the first of these that is read.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from time import perf_counter_ns
from typing import TypeVar

from intercept_protocol import rpc
from interceptd.connections.received_fds import ReceivedFds
from interceptd.connections.unread import is_long
from interceptd.ledger.inbox import Inbox

Whole = TypeVar("Whole")
LOOK_BYTES = 4096
"""Bytes per look: fifteen intercepts, or any usual control message."""
LONG_LOOK_NS = 200_000
"""Some thousand sends of the peer: a look is made for each request."""
SHORT_PAUSE_NS = 1_000_000
"""Since the last look so little can have been sent that the next one need not be guarded (1 us)."""
_MSG_CTRUNC = int(socket.MSG_CTRUNC)
STEPS = 64
"""Reads of one call where no look is made. Each takes some 4 us; a usual request takes 30."""


class RequestReader:
    """Of one connection. What it reads goes to the `inbox`, if there is one."""

    __slots__ = ("_looked_at", "_may_look", "_source", "inbox")

    def __init__(self, source: socket.socket) -> None:
        self._source = source
        self.inbox: Inbox | None = None
        self._may_look = True
        """Whether what is unread is not known to be long."""
        self._looked_at = 0
        """Nanoseconds of `perf_counter_ns`."""

    def read(
        self,
        receiver: rpc.Receiver,
        descriptors: ReceivedFds,
        recognise: Callable[[bytes], Whole | None] | None = None,
    ) -> rpc.Message | Whole | None:
        """Read what has arrived of a message, with its descriptors; None while the rest is missing. If
        `recognise` accepts all that a look shows, its result is the message.

        Raises `BlockingIOError` if nothing has arrived, `EOFError` if the peer has closed, `OSError`, and
        `ProtocolViolation`. Cheapest if the request is all that has arrived, in one piece.
        """
        now = perf_counter_ns()
        if not self._can_look(now):
            return self._read_in_steps(receiver, descriptors)
        data = self._source.recv(LOOK_BYTES, socket.MSG_PEEK)
        self._looked_at = perf_counter_ns()
        self._may_look = self._looked_at - now <= LONG_LOOK_NS
        unread = len(data)
        request: rpc.Message | Whole | None = None
        if recognise is not None and not receiver.has_bytes:
            request = recognise(data)
        if request is None and (request := _decoded(receiver, data)) is not None:
            unread -= receiver.drop_rest()
        while unread:
            unread -= len(self._receive(descriptors, unread, is_rest=request is not None))
        return request

    def take(self, expected: bytes) -> bool:
        """Take `expected` out of the socket if it is all that a look shows, and no descriptors come with it:
        those may be too many, which is for the task to say that reads this connection. Never blocks; raises
        `OSError`."""
        now = perf_counter_ns()
        if not self._can_look(now):
            return False
        self._looked_at = now
        data, _, flags, _ = self._source.recvmsg(len(expected) + 1, 0, socket.MSG_PEEK)
        if data != expected or flags & _MSG_CTRUNC:
            return False
        return self._source.recv(len(expected)) == expected

    def _can_look(self, now: int) -> bool:
        """Whether a look takes no longer than it may."""
        if self._may_look and now - self._looked_at > SHORT_PAUSE_NS:
            self._may_look = not is_long(self._source)
        return self._may_look

    def _receive(self, descriptors: ReceivedFds, size: int, *, is_rest: bool = False) -> bytes:
        """Read up to `size` bytes; if `is_rest`, they are all that is missing of a request."""
        inbox = self.inbox
        if inbox is None:
            return descriptors.receive(self._source, size)
        if not is_rest:
            inbox.expect_part()
        data = descriptors.receive(self._source, size, inbox)
        if not inbox.is_small or not is_rest or len(data) < size:
            inbox.note(len(data))
        return data

    def _read_in_steps(self, receiver: rpc.Receiver, descriptors: ReceivedFds) -> rpc.Message | None:
        """Read, several times, what the request has at least: a few bytes."""
        try:
            for _ in range(STEPS):
                request = _decoded(receiver, self._receive(descriptors, receiver.missing_bytes))
                if request is not None:
                    return request
        except BlockingIOError:
            self._may_look = True  # all was read
            raise
        return None


def _decoded(receiver: rpc.Receiver, data: bytes) -> rpc.Message | None:
    if not data:
        raise EOFError
    receiver.receive_data(data)
    return receiver.next_message()
