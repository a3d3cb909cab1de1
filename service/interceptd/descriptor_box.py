"""Descriptors that came in with a connection's bytes, until a method takes them.

Owns receiving them (SCM_RIGHTS, unix(7)) and closing those that nobody took. Must not know what they are.
"""

from __future__ import annotations

import array
import errno
import os
import socket
import threading

from intercept_protocol.errors import ProtocolViolation

KEPT = 4
"""Descriptors kept at most; one more than any method takes, so that the method can say what it got."""
CLOSING = 4
"""Batches that may be closing at a time."""
SCM_MAX_FD = 253
"""What one message can bring, include/net/scm.h."""
_LEFT: list[int] = []
"""Descriptors of whatever connection that could not be closed, because the system refused a thread."""
_ANCILLARY_BYTES = socket.CMSG_SPACE(SCM_MAX_FD * array.array("i").itemsize)


class DescriptorBox:
    def __init__(self) -> None:
        self._kept: list[int] = []
        self._closing: list[threading.Thread] = []
        self.received = 0
        """How many came since the last `take` or `drop`, those that were closed at once included."""

    def receive(self, source: socket.socket, size: int) -> bytes:
        """Like `recv`; what comes along is boxed, and closed where it is too many."""
        data, ancillary, _, _ = source.recvmsg(size, _ANCILLARY_BYTES, socket.MSG_CMSG_CLOEXEC)
        for level, kind, payload in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                descriptors = array.array("i")
                descriptors.frombytes(payload[: len(payload) - len(payload) % descriptors.itemsize])
                self._keep(list(descriptors))
        return data

    def take(self) -> list[int]:
        """Hand over what is kept; the taker closes them."""
        taken, self._kept, self.received = self._kept, [], 0
        return taken

    def drop(self) -> None:
        """Close what nobody took. Raises `ProtocolViolation` for a peer whose descriptors do not let go, or
        where the system refuses a thread."""
        self._dispose(self.take())

    def _keep(self, descriptors: list[int]) -> None:
        self.received += len(descriptors)
        room = KEPT - len(self._kept)
        self._kept += descriptors[:room]
        self._dispose(descriptors[room:])

    def _dispose(self, descriptors: list[int]) -> None:
        if not descriptors:
            return
        self._closing = [thread for thread in self._closing if thread.is_alive()]
        thread = close_aside(descriptors)
        if thread is None:
            raise ProtocolViolation(errno.EAGAIN, "there is no thread to close the descriptors in")
        self._closing.append(thread)
        if len(self._closing) > CLOSING:
            raise ProtocolViolation(errno.EPROTO, "closing the descriptors that were sent takes too long")


def close_aside(descriptors: list[int]) -> threading.Thread | None:
    """Close in a thread: a file on a peer's FUSE mount takes as long to close as the peer likes.

    None where the system refuses a thread; they are closed along with the next then. Call it from one thread.
    """
    all_left = [*_LEFT, *descriptors]

    def close() -> None:
        for descriptor in all_left:
            os.close(descriptor)

    thread = threading.Thread(target=close, name="close descriptors", daemon=True)
    try:
        thread.start()
    except RuntimeError:
        _LEFT.extend(descriptors)
        return None
    _LEFT.clear()
    return thread
