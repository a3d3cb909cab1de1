"""Descriptors received with the bytes of a connection, until a method takes them.

Owns receiving them (SCM_RIGHTS, unix(7)), closing those that were not taken, and the error if some were lost.
Must not know what they are.
"""

from __future__ import annotations

import array
import errno
import socket
from collections.abc import Iterable
from contextlib import suppress

from intercept_protocol.errors import ProtocolViolation, WireError
from interceptd.connections.closer import Closer
from interceptd.connections.unread import LOOK_LIMIT, may_bring_descriptors, unread_bytes
from interceptd.descriptor_reserve import kept_from_partitions
from interceptd.ledger.inbox import Inbox

KEPT_LIMIT = 5
"""Descriptors kept at a time: one more than any method takes, so that the method can report a surplus."""
SCM_MAX_FD = 253
"""Descriptors in one message, include/net/scm.h."""
_MSG_CTRUNC = int(socket.MSG_CTRUNC)
"""A plain number: with a member of an enum, `&` costs ten times as much, on every intercept."""
_ANCILLARY_BYTES = socket.CMSG_SPACE(SCM_MAX_FD * array.array("i").itemsize)


SO_PASSRIGHTS = 83
"""include/uapi/asm-generic/socket.h, since Linux 6.16."""


def let_send_descriptors(connection: socket.socket, *, may: bool) -> None:
    """Whether the peer may send descriptors; if not, its sendmsg(2) fails with EPERM. A connection inherits
    it from its listener. Without effect before Linux 6.16: `ReceivedFds` then closes what comes."""
    try:
        connection.setsockopt(socket.SOL_SOCKET, SO_PASSRIGHTS, may)
    except OSError as error:
        if error.errno != errno.ENOPROTOOPT:
            raise


def read_rest(source: socket.socket) -> bool:
    """Read what was sent, before a close. Returns whether a thread must read the rest: it is long, or brings
    descriptors.

    With unread data the connection would be reset, and the peer would get ECONNRESET instead of our error. To
    close or read the descriptors here may block; a look (MSG_PEEK) takes none.
    """
    with suppress(OSError):  # it is broken
        while unread_bytes(source):
            if may_bring_descriptors(source):
                return True
            source.recv(LOOK_LIMIT)
    return False


class ReceivedFds:
    """Keeps up to `limit` of them until they are taken or dropped; `closer` closes the others."""

    def __init__(self, closer: Closer, limit: int = KEPT_LIMIT) -> None:
        self._closer = closer
        self._limit = limit
        self._kept: list[int] = []
        self._loss: WireError | None = None
        """Why the descriptors received since the last `take` or `drop` cannot be taken."""
        self.received = 0
        """Descriptors received since the last `take` or `drop`, including those closed at once."""

    @property
    def holds_any(self) -> bool:
        """Whether descriptors wait to be taken. One may be the peer's end of this very connection."""
        return bool(self._kept)

    def look(self, source: socket.socket, size: int) -> bytes:
        """Like `receive`, but takes nothing out of the socket: what is kept are duplicates."""
        data, ancillary, flags, _ = source.recvmsg(
            size, _ANCILLARY_BYTES, socket.MSG_CMSG_CLOEXEC | socket.MSG_PEEK
        )
        self._keep_passed(ancillary, flags)
        return data

    def receive(self, source: socket.socket, size: int, inbox: Inbox | None = None) -> bytes:
        """Like `recv`, but keeps the descriptors that come along, and closes those beyond the limit. With an
        inbox, the kernel writes the bytes there; the caller notes them.

        Used even where none are wanted: `recv` would close them in this thread, which may block. Raises
        `OSError`, and like `drop`.
        """
        if self._closer.full and may_bring_descriptors(source):
            self._refuse()
        if inbox is None:
            data, ancillary, flags, _ = source.recvmsg(size, _ANCILLARY_BYTES, socket.MSG_CMSG_CLOEXEC)
        else:
            count, ancillary, flags, _ = source.recvmsg_into(
                inbox.space(size), _ANCILLARY_BYTES, socket.MSG_CMSG_CLOEXEC
            )
            data = inbox.received(count)
        if ancillary or flags & _MSG_CTRUNC:
            self._keep_passed(ancillary, flags)
        return data

    def take(self) -> list[int]:
        """Hand over the kept descriptors; the caller closes them. Raises the error given to `lose`."""
        if self._loss is not None:
            raise self._loss
        return self._empty()

    def lent(self) -> tuple[int, ...]:
        """The kept descriptors, which stay here: `drop` closes them. Raises the error given to `lose`."""
        if self._loss is not None:
            raise self._loss
        return tuple(self._kept)

    def lose(self, why: WireError) -> None:
        """Close the kept descriptors and all until the next `drop`; `take` raises `why`. Raises like `drop`.

        A request with only a part of its descriptors is of no use.
        """
        self._loss = why
        kept, self._kept = self._kept, []
        self._dispose(kept)

    def drop(self) -> None:
        """Close the descriptors that were not taken. Raises `ProtocolViolation` if that leaves the uid with
        too many that are not closed yet."""
        self._loss = None
        if self.received:
            self._dispose(self._empty())

    def close(self) -> None:
        """Close the kept descriptors, without an error: the connection ends anyway."""
        self._closer.close(self._empty())

    def _empty(self) -> list[int]:
        kept, self._kept, self.received = self._kept, [], 0
        return kept

    def _keep_passed(self, ancillary: Iterable[tuple[int, int, bytes]], flags: int) -> None:
        if ancillary:
            self._keep(_passed(ancillary))
        if flags & _MSG_CTRUNC:
            self.lose(_cut_off(self.received))

    def _keep(self, descriptors: list[int]) -> None:
        self.received += len(descriptors)
        if descriptors and kept_from_partitions(max(descriptors)):
            self.lose(_cut_off(self.received))
        room = self._limit - len(self._kept) if self._loss is None else 0
        self._kept += descriptors[:room]
        self._dispose(descriptors[room:])

    def _dispose(self, descriptors: list[int]) -> None:
        if not descriptors:
            return
        self._closer.close(descriptors)
        self._refuse()

    def _refuse(self) -> None:
        """Raises `ProtocolViolation` if the uid has too many descriptors that are not closed yet."""
        try:
            self._closer.require_room()
        except WireError as error:
            raise ProtocolViolation(
                error.number, f"{error.message}: those that were sent take too long to close", **error.details
            ) from None


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
