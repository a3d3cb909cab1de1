"""The socket that the daemon notifies: sd_notify(3), seen from the manager.

Owns receiving messages with their descriptors, and forwarding to the keeper's own manager. Must not know what
a message asks for.
"""

from __future__ import annotations

import array
import os
import socket
import sys
from collections.abc import Mapping
from contextlib import suppress
from typing import Final, NamedTuple

MESSAGE_BYTES: Final = 4096
_INT: Final = array.array("i").itemsize
_ANCILLARY_BYTES: Final = socket.CMSG_SPACE(253 * _INT) + socket.CMSG_SPACE(3 * _INT)
"""SCM_MAX_FD descriptors, and the sender's credentials."""
_FORWARDED: Final = frozenset(
    {"READY", "RELOADING", "STOPPING", "MONOTONIC_USEC", "STATUS", "WATCHDOG", "EXTEND_TIMEOUT_USEC"}
)
"""Facts that also hold for the keeper under its own manager. Not MAINPID: the keeper is the main process."""


class Message(NamedTuple):
    pid: int
    """Of its sender, from the kernel."""
    facts: Mapping[str, str]
    descriptors: list[int]
    complete: bool
    """Whether no descriptor was lost: at the limit of open files the kernel delivers only some."""


class NotifySocket:
    """In the abstract namespace: it needs no writable directory, and every process of the network namespace
    can send to it."""

    def __init__(self, outer: str) -> None:
        """`outer`: $NOTIFY_SOCKET of the keeper's own manager, or empty."""
        self._outer = f"\0{outer[1:]}" if outer.startswith("@") else outer
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        self._socket.bind("")  # the kernel chooses a free name
        self.name = f"@{self._socket.getsockname()[1:].decode()}"

    def fileno(self) -> int:
        return self._socket.fileno()

    def receive(self) -> Message | None:
        """The next message, None without one. Does not block."""
        try:
            data, ancillary, flags, _ = self._socket.recvmsg(
                MESSAGE_BYTES, _ANCILLARY_BYTES, socket.MSG_CMSG_CLOEXEC
            )
        except OSError:  # nothing has come; or the system has no memory, and the message waits
            return None
        pid, descriptors = 0, array.array("i")
        for level, kind, payload in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                descriptors.frombytes(payload[: len(payload) - len(payload) % _INT])
            elif (level, kind) == (socket.SOL_SOCKET, socket.SCM_CREDENTIALS):
                pid = int.from_bytes(payload[:_INT], sys.byteorder)
        lines = data.decode(errors="replace").splitlines()
        facts = dict(line.split("=", 1) for line in lines if "=" in line)
        return Message(pid, facts, list(descriptors), not flags & (socket.MSG_CTRUNC | socket.MSG_TRUNC))

    def forward(self, facts: Mapping[str, str]) -> None:
        """Tell the keeper's own manager what concerns it. If that is slow or gone, the message is lost."""
        lines = [f"{name}={value}" for name, value in facts.items() if name in _FORWARDED]
        if lines and self._outer.startswith(("/", "\0")):
            with suppress(OSError):
                self._socket.sendto(os.fsencode("\n".join(lines)), self._outer)
