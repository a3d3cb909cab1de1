"""The two kinds of error on the wire.

Owns their encoding. `WireError` is an answer: the request is refused, the connection goes on.
`ProtocolViolation` is final: nothing that the peer sends after it can be trusted. They are siblings, so that
code that handles refusals never catches a broken peer. Must not know who raises them.
"""

from __future__ import annotations

import errno
from collections.abc import Mapping

from .text import shape_of, visible


class EncodedError(Exception):
    """An error on the wire: ``[errno, name, message, details]``. Only its two subclasses are raised.

    `number` is a Linux errno, used as in the mshv ioctls; `details` names fields and ranges for programs,
    `message` for people. Text in it is escaped here, for every error and on both sides, because messages end
    up in answers, events, logs and terminals, and may quote a peer.
    """

    def __init__(self, number: int, message: str, /, **details: object) -> None:
        message = visible(message)
        super().__init__(number, message)
        self.number = number
        self.name = error_name(number)
        self.message = message
        self.details: Mapping[str, object] = details

    def __str__(self) -> str:
        return f"{self.name}: {self.message}"

    def to_wire(self) -> list[object]:
        """The error as it is sent."""
        return [self.number, self.name, self.message, dict(self.details)]


class WireError(EncodedError):
    """The request is refused, and the connection goes on."""

    @classmethod
    def from_wire(cls, value: object) -> WireError:
        """Decode a peer's error. The number determines the name, or the peer does if we have none for it.

        Raises `ProtocolViolation` EPROTO for a malformed error.
        """
        match value:
            case [int(number), str(name), str(message), dict(details)] if _is_errno(number):
                error = cls(number, message, **{str(key): item for key, item in details.items()})
                if error.name == f"E{number}":
                    error.name = visible(name)
                return error
            case _:
                raise ProtocolViolation(errno.EPROTO, f"the peer sent a malformed error: {shape_of(value)}")

    @classmethod
    def from_any(cls, value: object) -> WireError:
        """Like `from_wire`, but a malformed error becomes an EPROTO that describes it: for a peer that has
        refused or left in any case."""
        try:
            return cls.from_wire(value)
        except ProtocolViolation as violation:
            return cls(violation.number, violation.message)


class ProtocolViolation(EncodedError):
    """The peer broke the protocol: send it the error under msgid 0 and close the connection."""


def _is_errno(number: int) -> bool:
    return not isinstance(number, bool) and 0 < number <= _MAX_ERRNO


def error_name(number: int) -> str:
    """``EINVAL`` for 22; ``E4000`` for a number without a name in Linux."""
    return _KERNEL_NAMES.get(number) or errno.errorcode.get(number, f"E{number}")


def unwatched(userfaultfd_errno: int) -> str:
    """Why a VMM has no userfaultfd, for people."""
    usual = ", as under a container's default seccomp profile" if userfaultfd_errno == errno.EPERM else ""
    return f"{error_name(userfaultfd_errno)}{usual}"


_MAX_ERRNO = 4095
"""MAX_ERRNO in include/linux/err.h: the largest errno of the kernel."""
_KERNEL_NAMES = {errno.EDEADLK: "EDEADLK", errno.EOPNOTSUPP: "EOPNOTSUPP"}
"""Names in the kernel's errno.h for which Python's table has libc's alias."""
