"""The descriptors that are kept for the next daemon, by name.

Owns them until they are removed, hang up, or are let go. Must not know what they are for, but for which are
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
    """Of a socket: the same one is not kept twice under one name."""
    polled: bool


class Store:
    """`epoll` reports each polled descriptor that hung up, which the caller then drops."""

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
        """Keep descriptors, all or none, and close the rest; returns whether."""
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
            self._epoll.unregister(descriptor)  # a close alone would not do while others have duplicates
        _close(descriptor, entry.inode)

    def let_go(self) -> None:
        """Drop all. The peers of connections see the end first, whatever duplicates there are."""
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
    """End a connection at both ends; nothing happens to another file."""
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
    even look at it: it may be a stranger's, on a file system that does not answer."""
    with suppress(RuntimeError):  # no thread to be had: it stays open
        _thread.start_new_thread(os.close, (descriptor,))


def _close(descriptor: int, inode: int | None) -> None:
    """`close`, without a thread for a socket that nothing lies unread in: that may be another descriptor."""
    if inode is not None and _is_read(descriptor):
        os.close(descriptor)
    else:
        close(descriptor)


def _is_read(descriptor: int) -> bool:
    unread = array.array("i", [0])
    try:
        fcntl.ioctl(descriptor, termios.FIONREAD, unread)
    except OSError:  # it listens, and nobody knows what lies in connections that were not accepted
        return False
    return not unread[0]
