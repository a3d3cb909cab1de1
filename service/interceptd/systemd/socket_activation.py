"""Sockets that a service manager listens on for the daemon: sd_listen_fds(3), without libsystemd.

Owns $LISTEN_FDS and its companions, and checking the sockets. Must not know what is served on them.
"""

from __future__ import annotations

import os
import socket
from collections.abc import MutableMapping
from typing import Final

import msgspec

from interceptd.connections.unix_listener import ListenError

FIRST_DESCRIPTOR: Final = 3
"""SD_LISTEN_FDS_START."""
_VARIABLES: Final = ("LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES")


class PassedSockets(msgspec.Struct, frozen=True):
    """Listening sockets by FileDescriptorName= of their socket unit; None for one that the daemon binds."""

    vmm: socket.socket | None = None
    operator: socket.socket | None = None


def take_passed_sockets(environment: MutableMapping[str, str], pid: int) -> PassedSockets:
    """Take the sockets passed to the process `pid`, and remove their variables from `environment`. Raises
    `ListenError`."""
    count, recipient, names = (environment.pop(name, "") for name in _VARIABLES)
    if recipient != str(pid) or not count.isdecimal() or count == "0":
        return PassedSockets()
    named = names.split(":") if names else ["vmm"]
    if len(named) != int(count) or len(set(named)) != len(named) or not {"vmm", "operator"}.issuperset(named):
        raise ListenError(f"LISTEN_FDNAMES: expected vmm, operator or both for {count}, got {names!r}")
    numbered = enumerate(named, start=FIRST_DESCRIPTOR)
    return PassedSockets(**{name: _checked(descriptor, name) for descriptor, name in numbered})


def _checked(descriptor: int, name: str) -> socket.socket:
    """The listening Unix stream socket behind a descriptor. Raises `ListenError`."""
    try:
        os.set_inheritable(descriptor, False)
        passed = socket.socket(fileno=descriptor)
        listens = passed.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    except OSError as error:
        raise ListenError(f"passed descriptor {descriptor} ({name}): {error.strerror}") from error
    if (passed.family, passed.type) != (socket.AF_UNIX, socket.SOCK_STREAM) or not listens:
        passed.close()
        raise ListenError(f"passed descriptor {descriptor} ({name}): expected a listening Unix stream socket")
    return passed
