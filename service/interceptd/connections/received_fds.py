"""Descriptors received with the bytes of a connection, until a method takes them.

Owns receiving them (SCM_RIGHTS, unix(7)), closing those that were not taken, and the error if some were lost.
Must not know what they are.
"""

from __future__ import annotations

import array
import errno
import os
import socket
import threading
from collections.abc import Iterable
from contextlib import suppress

from intercept_protocol.errors import ProtocolViolation, WireError

KEPT_LIMIT = 4
"""Descriptors kept at a time: one more than any method takes, so that the method can report a surplus."""
CLOSING_LIMIT = 4
"""Batches of one connection that may be closing at a time."""
SCM_MAX_FD = 253
"""Descriptors in one message, include/net/scm.h."""
_DRAIN_BYTES = 1 << 16
_MSG_CTRUNC = int(socket.MSG_CTRUNC)
"""A plain number: with a member of an enum, `&` costs ten times as much, on every intercept."""
_UNCLOSED_LOCK = threading.Lock()
_UNCLOSED: list[int] = []
"""Descriptors of all connections that are still open because the system refused a thread to close them in."""
_ANCILLARY_BYTES = socket.CMSG_SPACE(SCM_MAX_FD * array.array("i").itemsize)


class ReceivedFds:
    """Keeps up to `limit` of them until they are taken or dropped."""

    def __init__(self, limit: int = KEPT_LIMIT) -> None:
        self._limit = limit
        self._kept: list[int] = []
        self._closing: list[threading.Thread] = []
        self._loss: WireError | None = None
        """Why the descriptors received since the last `take` or `drop` cannot be taken."""
        self.received = 0
        """Descriptors received since the last `take` or `drop`, including those closed at once."""

    @property
    def holds_any(self) -> bool:
        """Whether descriptors wait to be taken. One may be the peer's end of this very connection."""
        return bool(self._kept)

    def receive(self, source: socket.socket, size: int) -> bytes:
        """Like `recv`, but keeps the descriptors that come along, and closes those beyond the limit.

        Used even where none are wanted: `recv` would close them in this thread, which may block.
        """
        data, ancillary, flags, _ = source.recvmsg(size, _ANCILLARY_BYTES, socket.MSG_CMSG_CLOEXEC)
        if ancillary:
            self._keep(_passed(ancillary))
        if flags & _MSG_CTRUNC:
            self.lose(_cut_off(self.received))
        return data

    def drain(self, source: socket.socket) -> None:
        """Call before closing `source`: receive everything that its peer has sent, and let it send no more.
        Closing it would close unreceived descriptors in this thread, which may block."""
        found = self._empty()
        with suppress(OSError):  # it was never connected, or is broken
            source.shutdown(socket.SHUT_RD)
            data = b"unread"
            while data:
                data, ancillary, _, _ = source.recvmsg(
                    _DRAIN_BYTES, _ANCILLARY_BYTES, socket.MSG_CMSG_CLOEXEC
                )
                found += _passed(ancillary)
        if found:
            close_in_thread(found)

    def take(self) -> list[int]:
        """Hand over the kept descriptors; the caller closes them. Raises the error given to `lose`."""
        if self._loss is not None:
            raise self._loss
        return self._empty()

    def lose(self, why: WireError) -> None:
        """Close the kept descriptors and all until the next `drop`; `take` raises `why`. Raises like `drop`.

        A request with only a part of its descriptors is of no use.
        """
        self._loss = why
        kept, self._kept = self._kept, []
        self._dispose(kept)

    def drop(self) -> None:
        """Close the descriptors that were not taken. Raises `ProtocolViolation` if too many of this peer's
        are still being closed, or the system refuses a thread."""
        self._loss = None
        if self.received:
            self._dispose(self._empty())

    def _empty(self) -> list[int]:
        kept, self._kept, self.received = self._kept, [], 0
        return kept

    def _keep(self, descriptors: list[int]) -> None:
        self.received += len(descriptors)
        room = self._limit - len(self._kept) if self._loss is None else 0
        self._kept += descriptors[:room]
        self._dispose(descriptors[room:])

    def _dispose(self, descriptors: list[int]) -> None:
        if not descriptors:
            return
        self._closing = [thread for thread in self._closing if thread.is_alive()]
        thread = close_in_thread(descriptors)
        if thread is None:
            raise ProtocolViolation(errno.EAGAIN, "no thread available to close the descriptors")
        self._closing.append(thread)
        if len(self._closing) > CLOSING_LIMIT:
            raise ProtocolViolation(errno.EPROTO, "the descriptors that were sent take too long to close")


def _cut_off(received: int) -> WireError:
    """The kernel delivers as many as it can and tells only the receiver, by MSG_CTRUNC (recvmsg(2))."""
    return WireError(
        errno.EMFILE,
        f"the daemon could receive only {received} of the descriptors: it is at its limit of open files, or "
        "a security module withheld one; send them again",
        received=received,
    )


def _passed(ancillary: Iterable[tuple[int, int, bytes]]) -> list[int]:
    descriptors = array.array("i")
    for level, kind, payload in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            descriptors.frombytes(payload[: len(payload) - len(payload) % descriptors.itemsize])
    return list(descriptors)


def close_each(descriptors: Iterable[int]) -> None:
    """Close all of them, also when a close reports an error (a file on NFS or FUSE, close(2)): on Linux the
    descriptor is closed all the same. Blocks for as long as their file systems take."""
    for descriptor in descriptors:
        with suppress(OSError):
            os.close(descriptor)


def close_in_thread(descriptors: list[int]) -> threading.Thread | None:
    """Close in a thread: a peer decides how long closing a file on its FUSE mount takes.

    None if the system refuses a thread; the next call then closes them too.
    """
    with _UNCLOSED_LOCK:
        unclosed = [*_UNCLOSED, *descriptors]
        thread = threading.Thread(target=close_each, args=(unclosed,), name="close descriptors", daemon=True)
        try:
            thread.start()
        except RuntimeError:
            _UNCLOSED.extend(descriptors)
            return None
        _UNCLOSED.clear()
    return thread
