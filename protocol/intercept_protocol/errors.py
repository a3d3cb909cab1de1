"""The two kinds of error on the wire.

`WireError` is an answer: the request is refused, the connection goes on. `ProtocolViolation` is for good:
what the peer sent is no request, and nothing after it can be trusted. Neither knows who raised it.
"""

from __future__ import annotations

import errno
from collections.abc import Mapping

from .text import form, visible


class WireError(Exception):
    """An error as it travels: ``[errno, name, message, details]``.

    `number` is a Linux errno, used as the mshv ioctls use them; `details` names fields and ranges for
    programs, `message` for people. What a message quotes from outside is made visible here, for every error
    and at both ends: it goes into answers, events and logs, and onto terminals.
    """

    def __init__(self, number: int, message: str, /, **details: object) -> None:
        message = visible(message)
        super().__init__(f"{error_name(number)}: {message}")
        self.number = number
        self.message = message
        self.details: Mapping[str, object] = details

    @property
    def name(self) -> str:
        return error_name(self.number)

    def to_wire(self) -> list[object]:
        return [self.number, self.name, self.message, dict(self.details)]

    @classmethod
    def from_wire(cls, value: object) -> WireError:
        """Read a peer's error. Anything that is not of the form becomes EPROTO.

        The number decides, whatever name came with it: `name` is the number's.
        """
        match value:
            case [int(number), str(), str(message), dict(details)] if _is_errno(number):
                return cls(number, message, **{str(key): item for key, item in details.items()})
            case _:
                return cls(errno.EPROTO, f"the peer sent an error of another form: {form(value)}")


class ProtocolViolation(WireError):
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
