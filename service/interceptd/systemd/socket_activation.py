"""Sockets that a service manager listens on for us: sd_listen_fds(3), without its library.

Owns $LISTEN_FDS and its companions, and the check of what came. Must not know what is served on them.
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
    """Listening sockets by their name, FileDescriptorName= in a socket unit; None: bind it yourself."""

    vmm: socket.socket | None = None
    operator: socket.socket | None = None


def take_passed_sockets(environment: MutableMapping[str, str], pid: int) -> PassedSockets:
    """Take what was passed to the process `pid`, out of the environment too. Raises `ListenError`."""
    count, meant_for, names = (environment.pop(name, "") for name in _VARIABLES)
    if meant_for != str(pid) or not count.isdecimal() or count == "0":
        return PassedSockets()
    named = names.split(":") if names else ["vmm"]
    if len(named) != int(count) or len(set(named)) != len(named) or not {"vmm", "operator"}.issuperset(named):
        raise ListenError(f"LISTEN_FDNAMES: expected vmm, operator or both for {count}, got {names!r}")
    numbered = enumerate(named, start=FIRST_DESCRIPTOR)
    return PassedSockets(**{name: _checked(descriptor, name) for descriptor, name in numbered})


def _checked(descriptor: int, name: str) -> socket.socket:
    """The socket behind a descriptor, if it is one that we can serve on."""
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
