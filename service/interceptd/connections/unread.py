"""What lies unread in a socket, without reading it.

Owns how far a look (MSG_PEEK) may go. A look walks through all that is unread, up to the first descriptors,
however little it returns: 0.2 us for each send(2) of the peer. The peer decides how many there are
(SO_SNDBUF, up to the kernel's net.core.wmem_max), but each carries a byte.
"""

from __future__ import annotations

import fcntl
import socket
import sys
import termios

LOOK_LIMIT = 1 << 14
"""Bytes that may be unread where a look is made, so that it takes 3 ms at most. The largest request that
lists make has about as many (F-6)."""
_MSG_CTRUNC = int(socket.MSG_CTRUNC)


def unread_bytes(source: socket.socket) -> int:
    """How many there are (FIONREAD); none if it is closed here."""
    if source.fileno() < 0:
        return 0
    return int.from_bytes(fcntl.ioctl(source, termios.FIONREAD, bytes(4)), sys.byteorder)


def is_long(source: socket.socket) -> bool:
    """Whether a look might take too long."""
    return unread_bytes(source) > LOOK_LIMIT


def may_bring_descriptors(source: socket.socket) -> bool:
    """Whether descriptors lie anywhere in what is unread, or that is too much to look at."""
    unread = unread_bytes(source)
    return unread > LOOK_LIMIT or (
        unread > 0 and bool(source.recvmsg(1, 0, socket.MSG_PEEK)[2] & _MSG_CTRUNC)
    )
