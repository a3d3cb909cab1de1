"""The descriptors that are kept for the next daemon, by name.

Owns them until they are removed, hang up, or are let go. Of their purpose it knows only which are
connections.
"""

from __future__ import annotations

import _thread
import array
import fcntl
import os
import re
import select
import socket
import stat
import termios
from collections.abc import Sequence
from contextlib import suppress
from typing import Final, NamedTuple

CAPACITY: Final = 4096
"""As FileDescriptorStoreMax= of the systemd units."""
_NAME: Final = re.compile("[a-z0-9-]{1,24}")
"""All names together fit into one variable, which may have 128 KiB."""


class _Entry(NamedTuple):
    name: str
    inode: int | None
    """Of a socket, which is not kept twice under one name."""
    polled: bool


class Store:
    """`epoll` reports each polled descriptor that hung up; the caller then drops it."""

    def __init__(self, epoll: select.epoll, capacity: int) -> None:
        self._epoll = epoll
        self._entries: dict[int, _Entry] = {}
        self._sockets: set[tuple[str, int]] = set()
        """Name and inode of each."""
        self.capacity = capacity

    def __len__(self) -> int:
        return len(self._entries)

    def named(self) -> list[tuple[str, int]]:
        """Names and descriptors, in the order in which they came."""
        return [(entry.name, descriptor) for descriptor, entry in self._entries.items()]

    def add(self, name: str, descriptors: Sequence[int], *, polled: bool) -> bool:
        """Keep all descriptors, or close them; returns whether they were kept. Closes repeated sockets."""
        fits = bool(_NAME.fullmatch(name)) and len(self) + len(descriptors) <= self.capacity
        for descriptor in descriptors:
            inode = _inode_of_socket(descriptor)
            if not fits or (inode is not None and (name, inode) in self._sockets):
                _close(descriptor, inode)
                continue
            if inode is not None:
                self._sockets.add((name, inode))
            self._entries[descriptor] = _Entry(name, inode, polled and self._poll(descriptor))
        return fits

    def remove(self, name: str) -> None:
        for each, descriptor in self.named():
            if each == name:
                self.drop(descriptor)

    def drop(self, descriptor: int) -> None:
        entry = self._entries.pop(descriptor)
        if entry.inode is not None:
            self._sockets.remove((entry.name, entry.inode))
        if entry.polled:
            self._epoll.unregister(descriptor)  # closing is not enough while others have duplicates
        _close(descriptor, entry.inode)

    def let_go(self) -> None:
        """Drop all. Connections are shut down first: others may have duplicates."""
        for descriptor in self._entries:
            hang_up(descriptor)
        for descriptor in list(self._entries):
            self.drop(descriptor)

    def _poll(self, descriptor: int) -> bool:
        try:
            self._epoll.register(descriptor, 0)  # hang-ups and errors are always reported
        except OSError:  # a file that cannot hang up, or the system has no room for a watch
            return False
        return True


def _inode_of_socket(descriptor: int) -> int | None:
    status = os.fstat(descriptor)
    return status.st_ino if stat.S_ISSOCK(status.st_mode) else None


def hang_up(descriptor: int) -> None:
    """Shut a connection down; other files are left alone."""
    try:
        found = socket.socket(fileno=descriptor)
    except OSError:
        return
    with suppress(OSError):
        if not found.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            found.shutdown(socket.SHUT_RDWR)
    found.detach()


def close(descriptor: int) -> None:
    """Close without waiting: the last close of a userfaultfd waits for the mmap lock of its process. Does not
    examine the file either: a stranger's may be on a file system that does not answer."""
    with suppress(RuntimeError):  # the system refuses a thread: it stays open
        _thread.start_new_thread(os.close, (descriptor,))


def _close(descriptor: int, inode: int | None) -> None:
    """`close`, but without a thread for a socket with nothing unread: unread data may contain descriptors."""
    if inode is not None and _is_read(descriptor):
        os.close(descriptor)
    else:
        close(descriptor)


def _is_read(descriptor: int) -> bool:
    unread = array.array("i", [0])
    try:
        fcntl.ioctl(descriptor, termios.FIONREAD, unread)
    except OSError:  # it listens: connections that were not accepted may contain descriptors
        return False
    return not unread[0]
