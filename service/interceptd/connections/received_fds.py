"""Descriptors that came in with a connection's bytes, until a method takes them.

Owns receiving them (SCM_RIGHTS, unix(7)), closing those that nobody took, and the reason where some are
lost. Must not know what they are.
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

KEPT = 4
"""Descriptors kept at most; one more than any method takes, so that the method can say what it got."""
CLOSING = 4
"""Batches that may be closing at a time."""
SCM_MAX_FD = 253
"""What one message can bring, include/net/scm.h."""
_DRAIN_BYTES = 1 << 16
_LEFT_LOCK = threading.Lock()
_LEFT: list[int] = []
"""Descriptors of whatever connection that could not be closed, because the system refused a thread."""
_ANCILLARY_BYTES = socket.CMSG_SPACE(SCM_MAX_FD * array.array("i").itemsize)


class ReceivedFds:
    """Keeps `most` of them until they are taken or dropped."""

    def __init__(self, most: int = KEPT) -> None:
        self._most = most
        self._kept: list[int] = []
        self._closing: list[threading.Thread] = []
        self._loss: WireError | None = None
        """Why those that came since the last `take` or `drop` are not to be had."""
        self.received = 0
        """How many came since the last `take` or `drop`, those that were closed at once included."""

    @property
    def holds_any(self) -> bool:
        """Whether a descriptor waits to be taken: one of the peer's own connection keeps that open."""
        return bool(self._kept)

    def receive(self, source: socket.socket, size: int) -> bytes:
        """Like `recv`; what comes along is boxed, and closed where it is too many.

        Also where none is wanted: `recv` takes 0.4 us less, but closes them on the spot, for as long as that
        takes.
        """
        data, ancillary, flags, _ = source.recvmsg(size, _ANCILLARY_BYTES, socket.MSG_CMSG_CLOEXEC)
        if ancillary:
            self._keep(_passed(ancillary))
        if flags & socket.MSG_CTRUNC:
            self.lose(_cut_off(self.received))
        return data

    def drain(self, source: socket.socket) -> None:
        """Before `source` is closed, which would close in passing what was not received yet: take in all that
        its peer has sent, and let it send no more."""
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
        """Hand over what is kept; the taker closes them. Raises what `lose` was told."""
        if self._loss is not None:
            raise self._loss
        return self._empty()

    def lose(self, why: WireError) -> None:
        """Close what is kept and what comes along until the next `drop`; `take` says why. Raises like `drop`.

        A part of what a request brings is of no use to it.
        """
        self._loss = why
        kept, self._kept = self._kept, []
        self._dispose(kept)

    def drop(self) -> None:
        """Close what nobody took. Raises `ProtocolViolation` for a peer whose descriptors do not let go, or
        where the system refuses a thread."""
        self._loss = None
        if self.received:
            self._dispose(self._empty())

    def _empty(self) -> list[int]:
        kept, self._kept, self.received = self._kept, [], 0
        return kept

    def _keep(self, descriptors: list[int]) -> None:
        self.received += len(descriptors)
        room = self._most - len(self._kept) if self._loss is None else 0
        self._kept += descriptors[:room]
        self._dispose(descriptors[room:])

    def _dispose(self, descriptors: list[int]) -> None:
        if not descriptors:
            return
        self._closing = [thread for thread in self._closing if thread.is_alive()]
        thread = close_in_thread(descriptors)
        if thread is None:
            raise ProtocolViolation(errno.EAGAIN, "there is no thread to close the descriptors in")
        self._closing.append(thread)
        if len(self._closing) > CLOSING:
            raise ProtocolViolation(errno.EPROTO, "closing the descriptors that were sent takes too long")


def _cut_off(received: int) -> WireError:
    """The kernel passes on as many as it can and tells only the receiver, with MSG_CTRUNC (recvmsg(2))."""
    return WireError(
        errno.EMFILE,
        f"of the descriptors that were sent the daemon could receive only {received}: it is at its limit of "
        "open files, or a security module keeps one back; send them again",
        received=received,
    )


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


def close_in_thread(descriptors: list[int]) -> threading.Thread | None:
    """Close in a thread: a file on a peer's FUSE mount takes as long to close as the peer likes.

    None where the system refuses a thread; they are closed along with the next then.
    """
    with _LEFT_LOCK:
        all_left = [*_LEFT, *descriptors]
        thread = threading.Thread(target=close_each, args=(all_left,), name="close descriptors", daemon=True)
        try:
            thread.start()
        except RuntimeError:
            _LEFT.extend(descriptors)
            return None
        _LEFT.clear()
    return thread
