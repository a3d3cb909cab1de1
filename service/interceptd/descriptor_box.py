"""Descriptors that came in with a connection's bytes, until a method takes them.

Owns receiving them (SCM_RIGHTS, unix(7)) and closing those that nobody took. Must not know what they are.
"""

from __future__ import annotations

import array
import errno
import os
import socket
import threading
from collections.abc import Iterable
from contextlib import suppress

from intercept_protocol.errors import ProtocolViolation

KEPT = 4
"""Descriptors kept at most; one more than any method takes, so that the method can say what it got."""
CLOSING = 4
"""Batches that may be closing at a time."""
SCM_MAX_FD = 253
"""What one message can bring, include/net/scm.h."""
_DRAIN_BYTES = 1 << 16
_LEFT: list[int] = []
"""Descriptors of whatever connection that could not be closed, because the system refused a thread."""
_ANCILLARY_BYTES = socket.CMSG_SPACE(SCM_MAX_FD * array.array("i").itemsize)


class DescriptorBox:
    """Keeps `most` of them until they are taken or dropped."""

    def __init__(self, most: int = KEPT) -> None:
        self._most = most
        self._kept: list[int] = []
        self._closing: list[threading.Thread] = []
        self.received = 0
        """How many came since the last `take` or `drop`, those that were closed at once included."""

    def receive(self, source: socket.socket, size: int) -> bytes:
        """Like `recv`; what comes along is boxed, and closed where it is too many.

        Also where none is wanted: `recv` takes 0.4 us less, but closes them on the spot, for as long as that
        takes.
        """
        data, ancillary, _, _ = source.recvmsg(size, _ANCILLARY_BYTES, socket.MSG_CMSG_CLOEXEC)
        if ancillary:
            self._keep(_passed(ancillary))
        return data

    def drain(self, source: socket.socket) -> None:
        """Before `source` is closed, which would close in passing what was not received yet: take in all that
        its peer has sent, and let it send no more."""
        found = self.take()
        with suppress(OSError):  # it was never connected, or is broken
            source.shutdown(socket.SHUT_RD)
            data = b"unread"
            while data:
                data, ancillary, _, _ = source.recvmsg(
                    _DRAIN_BYTES, _ANCILLARY_BYTES, socket.MSG_CMSG_CLOEXEC
                )
                found += _passed(ancillary)
        if found:
            close_aside(found)

    def take(self) -> list[int]:
        """Hand over what is kept; the taker closes them."""
        taken, self._kept, self.received = self._kept, [], 0
        return taken

    def drop(self) -> None:
        """Close what nobody took. Raises `ProtocolViolation` for a peer whose descriptors do not let go, or
        where the system refuses a thread."""
        if self.received:
            self._dispose(self.take())

    def _keep(self, descriptors: list[int]) -> None:
        self.received += len(descriptors)
        room = self._most - len(self._kept)
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


def _passed(ancillary: Iterable[tuple[int, int, bytes]]) -> list[int]:
    descriptors = array.array("i")
    for level, kind, payload in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            descriptors.frombytes(payload[: len(payload) - len(payload) % descriptors.itemsize])
    return list(descriptors)


def close_each(descriptors: Iterable[int]) -> None:
    """Close them all, though a close says that it failed (of a file on NFS or FUSE, close(2)): on Linux the
    descriptor is closed all the same. Takes as long as their file systems like."""
    for descriptor in descriptors:
        with suppress(OSError):
            os.close(descriptor)


def close_aside(descriptors: list[int]) -> threading.Thread | None:
    """Close in a thread: a file on a peer's FUSE mount takes as long to close as the peer likes.

    None where the system refuses a thread; they are closed along with the next then. Call it from one thread.
    """
    all_left = [*_LEFT, *descriptors]

    thread = threading.Thread(target=close_each, args=(all_left,), name="close descriptors", daemon=True)
    try:
        thread.start()
    except RuntimeError:
        _LEFT.extend(descriptors)
        return None
    _LEFT.clear()
    return thread
