"""The process at the other end of a Unix socket, by the credentials that the kernel gives.

Owns reading the credentials, and the rule that says who may connect; must not know roles or partitions.
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
"""include/uapi/asm-generic/socket.h; the socket module of Python 3.11 has neither."""
_GID = struct.Struct("I")
_GROUPS_BYTES = 1024
"""256 groups, the most that Python's getsockopt takes. Linux allows 65,536 (NGROUPS_MAX)."""


class Peer(msgspec.Struct, frozen=True):
    """The credentials of the process that connected, as of connect(2)."""

    pid: int
    """0 if the process has none in our pid namespace: it is in another container, for example."""
    uid: int
    gid: int

    @property
    def named(self) -> dict[str, object]:
        """The fields of a log line that say who it is."""
        fields: dict[str, object] = {"pid": self.pid, "uid": self.uid}
        return fields if self.pid else fields | {"pid_namespace": "another"}

    @classmethod
    def of(cls, connected: socket.socket) -> Peer:
        return cls(*_UCRED.unpack(connected.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)))


class Pidfd:
    """A pidfd of the process that connected: readable once it has exited. Owns the descriptor."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    @classmethod
    def of(cls, connected: socket.socket) -> Pidfd | None:
        """None if the kernel lacks SO_PEERPIDFD (before Linux 6.5), or the process has exited."""
        try:
            return cls(connected.getsockopt(socket.SOL_SOCKET, SO_PEERPIDFD))
        except OSError:
            return None

    def fileno(self) -> int:
        return self._descriptor

    def close(self) -> None:
        os.close(self._descriptor)


def peer_groups(connected: socket.socket) -> frozenset[int]:
    """The supplementary groups of the process that connected, as of connect(2). Empty if they cannot be read:
    more than 256 groups, or a kernel before Linux 4.13."""
    try:
        groups = connected.getsockopt(socket.SOL_SOCKET, SO_PEERGROUPS, _GROUPS_BYTES)
    except OSError:
        return frozenset()
    return frozenset(gid for (gid,) in _GID.iter_unpack(groups))


def overflow_uid() -> int:
    """The uid that stands for every uid that our user namespace does not map (user_namespaces(7))."""
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
    """Raises EACCES unless the peer's uid is in `allowed_uids`, or its primary group or one of `groups`, its
    supplementary ones, is in `allowed_gids`.

    The overflow uid must itself be in `allowed_uids`, whatever its groups: it may stand for several tenants
    of other user namespaces.
    """
    if peer.uid in allowed_uids:
        return
    overflow = peer.uid == overflow_uid()
    if allowed_gids and not overflow and not {peer.gid, *groups()}.isdisjoint(allowed_gids):
        return
    hint = " (the overflow uid: a peer of another user namespace)" if overflow else ""
    of_gids = ", and none of its groups in allowed_gids" if allowed_gids else ""
    raise WireError(errno.EACCES, f"uid {peer.uid}{hint} is not in allowed_uids{of_gids}", uid=peer.uid)
