"""Who is at the other end of a Unix socket, by the kernel's word.

Owns reading the credentials and the rule who may come in; must not know roles or partitions.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Callable, Collection
from pathlib import Path

import msgspec

from intercept_protocol.errors import WireError

_UCRED = struct.Struct("iII")
"""struct ucred: pid, uid, gid (SO_PEERCRED, unix(7))."""


SO_PEERGROUPS = 59
SO_PEERPIDFD = 77
"""include/uapi/asm-generic/socket.h; neither is in the socket module of Python 3.11."""
_GID = struct.Struct("I")
_GROUPS_BYTES = 1024
"""256 groups: what Python's getsockopt takes. Linux has up to 65,536 (NGROUPS_MAX)."""


class Peer(msgspec.Struct, frozen=True):
    """The process that connected, as it was when it did."""

    pid: int
    uid: int
    gid: int

    @classmethod
    def of(cls, connected: socket.socket) -> Peer:
        return cls(*_UCRED.unpack(connected.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)))


class Pidfd:
    """A handle on the process that connected: readable once it has exited. Owns the descriptor."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    @classmethod
    def of(cls, connected: socket.socket) -> Pidfd | None:
        """None where the kernel has no SO_PEERPIDFD (before Linux 6.5), or the process is gone already."""
        try:
            return cls(connected.getsockopt(socket.SOL_SOCKET, SO_PEERPIDFD))
        except OSError:
            return None

    def fileno(self) -> int:
        return self._descriptor

    def close(self) -> None:
        os.close(self._descriptor)


def peer_groups(connected: socket.socket) -> frozenset[int]:
    """The supplementary groups of the process that connected, as they were when it did; none where they
    cannot be told: more than 256, or a kernel before Linux 4.13."""
    try:
        groups = connected.getsockopt(socket.SOL_SOCKET, SO_PEERGROUPS, _GROUPS_BYTES)
    except OSError:
        return frozenset()
    return frozenset(gid for (gid,) in _GID.iter_unpack(groups))


def overflow_uid() -> int:
    """The uid that stands for every uid without a name in our user namespace (user_namespaces(7))."""
    try:
        return int(Path("/proc/sys/kernel/overflowuid").read_text())
    except OSError:
        return 65534


def require_allowed(
    peer: Peer,
    allowed_uids: Collection[int],
    allowed_gids: Collection[int] = (),
    groups: Callable[[], Collection[int]] = tuple,
) -> None:
    """Raises EACCES unless the peer's uid is among `allowed_uids`, or one of its groups, the primary or a
    supplementary one of `groups`, among `allowed_gids`.

    The overflow uid must be named itself: across user namespaces it may be several tenants, and a group that
    they share makes them none.
    """
    if peer.uid in allowed_uids:
        return
    overflow = peer.uid == overflow_uid()
    if allowed_gids and not overflow and not {peer.gid, *groups()}.isdisjoint(allowed_gids):
        return
    hint = " (the overflow uid: a peer of another user namespace)" if overflow else ""
    of_gids = ", nor one of its groups among allowed_gids" if allowed_gids else ""
    raise WireError(errno.EACCES, f"uid {peer.uid}{hint} is not among allowed_uids{of_gids}", uid=peer.uid)
