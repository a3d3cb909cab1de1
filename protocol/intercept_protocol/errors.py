"""The two kinds of error on the wire.

Owns the form in which both travel. `WireError` is an answer: the request is refused, the connection goes on.
`ProtocolViolation` is for good: nothing that the peer sends after it can be trusted. They are siblings, so
that a handler of refusals never takes a broken peer for one. Must not know who raised them.
"""

from __future__ import annotations

import errno
from collections.abc import Mapping

from .text import form, visible


class EncodedError(Exception):
    """An error as it travels: ``[errno, name, message, details]``. Only its two subclasses are raised.

    `number` is a Linux errno, used as the mshv ioctls use them; `details` names fields and ranges for
    programs, `message` for people. What a message quotes from outside is made visible here, for every error
    and at both ends: it goes into answers, events and logs, and onto terminals.
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
        """Read a peer's error. The number decides the name; a number without a name here keeps the peer's.

        Raises `ProtocolViolation` EPROTO for anything that is not of the form.
        """
        match value:
            case [int(number), str(name), str(message), dict(details)] if _is_errno(number):
                error = cls(number, message, **{str(key): item for key, item in details.items()})
                if error.name == f"E{number}":
                    error.name = visible(name)
                return error
            case _:
                raise ProtocolViolation(
                    errno.EPROTO, f"the peer sent an error of another form: {form(value)}"
                )

    @classmethod
    def in_words(cls, value: object) -> WireError:
        """As `from_wire`, but EPROTO with the form of what was sent: for a peer that has refused or left,
        however badly it says so."""
        try:
            return cls.from_wire(value)
        except ProtocolViolation as violation:
            return cls(violation.number, violation.message)


class ProtocolViolation(EncodedError):
    """The peer broke the protocol: it is told so under msgid 0 and the connection is closed."""


def _is_errno(number: int) -> bool:
    return not isinstance(number, bool) and 0 < number <= _MAX_ERRNO


def error_name(number: int) -> str:
    """``EINVAL`` for 22; the number's text for one that Linux does not name."""
    return _KERNEL_NAMES.get(number) or errno.errorcode.get(number, f"E{number}")


_MAX_ERRNO = 4095
"""The largest errno that the kernel may return: MAX_ERRNO in include/linux/err.h."""
_KERNEL_NAMES = {errno.EDEADLK: "EDEADLK", errno.EOPNOTSUPP: "EOPNOTSUPP"}
"""Where Python's table has libc's alias instead of the name in the kernel's errno.h."""
