"""Descriptors that a service manager passes to the daemon: sd_listen_fds(3), without libsystemd.

Owns $LISTEN_FDS and its companions, and sorting by name: sockets of a socket unit, sockets that a predecessor
bound, and its other stored descriptors. Must not know what is served on a socket, or what a stored descriptor
is.
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Container, MutableMapping
from contextlib import suppress
from typing import Final, NamedTuple

import msgspec
import structlog

from intercept_protocol.text import sentence
from interceptd.connections.unix_listener import ListenError

log = structlog.get_logger()

FIRST_DESCRIPTOR: Final = 3
"""SD_LISTEN_FDS_START."""
OWN_VMM: Final = "own-vmm"
OWN_OPERATOR: Final = "own-operator"
"""Names in the store of the listeners that the daemon bound itself."""
_VARIABLES: Final = ("LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES")
_LISTENERS: Final = ("vmm", "operator", OWN_VMM, OWN_OPERATOR)
_STORED: Final = re.compile("d|[pcmlif][0-9a-z]+")
_SEVERAL: Final = re.compile("[cm].*")
"""Stored names that several descriptors may share."""


class Kept(NamedTuple):
    """A descriptor that a predecessor stored, under its name."""

    name: str
    descriptor: int


class PassedSockets(msgspec.Struct, frozen=True):
    """Listening sockets by FileDescriptorName= of their socket unit, and those that a predecessor bound; None
    for one that the daemon has to bind."""

    vmm: socket.socket | None = None
    operator: socket.socket | None = None
    own_vmm: socket.socket | None = None
    own_operator: socket.socket | None = None
    kept: tuple[Kept, ...] = ()
    """What else the predecessor stored, in the order of the store."""
    unused: tuple[str, ...] = ()
    """Names of descriptors that were not usable. They are closed here, but still in the store."""


def take_passed_sockets(
    environment: MutableMapping[str, str], pid: int, *, keeps: bool = False
) -> PassedSockets:
    """Take what was passed to the process `pid`, and remove its variables from `environment`. No program that
    the process starts inherits it.

    Raises `ListenError` for a descriptor that is not usable. A daemon that `keeps` logs and closes it
    instead: what another version stored must not stop the start, which would end every partition.
    """
    count, recipient, names = (environment.pop(name, "") for name in _VARIABLES)
    if recipient != str(pid) or not count.isdecimal() or count == "0":
        return PassedSockets()
    named = names.split(":") if names else ["vmm"]
    if len(named) != int(count):
        raise ListenError(f"LISTEN_FDNAMES: expected {count} names, got {names!r}")
    listeners: dict[str, socket.socket] = {}
    kept: list[Kept] = []
    unused: list[str] = []
    taken: set[str] = set()
    for descriptor, name in enumerate(named, start=FIRST_DESCRIPTOR):
        try:
            os.set_inheritable(descriptor, False)
            _require_known(name, taken)
            if name in _LISTENERS:
                listeners[name] = _listening(descriptor, name)
            else:
                kept.append(Kept(name, descriptor))
            taken.add(name)
        except (ListenError, OSError) as error:
            if not keeps:
                raise ListenError(sentence(error)) from None
            log.error(  # noqa: TRY400 - not a fault of ours
                "passed_descriptor_not_used", name=name, error=sentence(error)
            )
            unused.append(name)
            _discard(descriptor)
    vmm, operator, own_vmm, own_operator = map(listeners.get, _LISTENERS)
    return PassedSockets(vmm, operator, own_vmm, own_operator, tuple(kept), tuple(unused))


def _require_known(name: str, taken: Container[str]) -> None:
    if name not in _LISTENERS and not _STORED.fullmatch(name):
        raise ListenError(f"LISTEN_FDNAMES: expected vmm, operator or both, got {name!r}")
    if name in taken and not _SEVERAL.match(name):
        raise ListenError(f"LISTEN_FDNAMES: expected each name once, got {name!r} again")


def _listening(descriptor: int, name: str) -> socket.socket:
    """The listening Unix stream socket behind a descriptor. Raises `ListenError` and leaves it open."""
    try:
        passed = socket.socket(fileno=descriptor)
    except OSError as error:
        raise ListenError(f"passed descriptor {descriptor} ({name}): {error.strerror}") from error
    listens = passed.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    if (passed.family, passed.type) != (socket.AF_UNIX, socket.SOCK_STREAM) or not listens:
        passed.detach()
        raise ListenError(f"passed descriptor {descriptor} ({name}): expected a listening Unix stream socket")
    return passed


def _discard(descriptor: int) -> None:
    """Close it. A connection is shut down first: the store has a duplicate. A listener goes on listening: it
    may be the service manager's."""
    try:
        found = socket.socket(fileno=descriptor)
    except OSError:  # not a socket, or not open
        with suppress(OSError):
            os.close(descriptor)
        return
    with found, suppress(OSError):
        if not found.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            found.shutdown(socket.SHUT_RDWR)
