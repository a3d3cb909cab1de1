"""The kernel's number of a socket: how a daemon and its successor name a connection.

Must not know what the connection is for.
"""

from __future__ import annotations

import socket
import sys

SO_COOKIE = 57
"""include/uapi/asm-generic/socket.h, since Linux 4.12."""


def cookie_of(sock: socket.socket) -> int:
    """No other socket of this boot has it, and duplicates of the descriptor have the same."""
    return int.from_bytes(sock.getsockopt(socket.SOL_SOCKET, SO_COOKIE, 8), sys.byteorder)
