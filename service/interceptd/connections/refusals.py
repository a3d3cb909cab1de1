"""Requests that were answered with an error: how many, and a line in the log where a limit is the reason.

Owns the count by method and error, and the words for what a client may choose freely. Must not know why a
request was refused.
"""

from __future__ import annotations

import errno
from collections import Counter
from typing import Final

import structlog

from intercept_protocol.errors import EncodedError
from intercept_protocol.messages import NOTIFIER_METHODS, OPERATOR_METHODS, VMM_METHODS
from interceptd.log_pace import LogPace

log = structlog.get_logger()

METHODS: Final = tuple(sorted({"hello", *VMM_METHODS, *NOTIFIER_METHODS, *OPERATOR_METHODS}))
UNKNOWN: Final = "unknown"
"""Stands for every other method."""
CONNECTION: Final = "connection"
"""In the log, stands for a connection that was closed under msgid 0."""
_ERRORS: Final = frozenset({
    errno.EPERM, errno.ENOENT, errno.EIO, errno.EAGAIN, errno.ENOMEM, errno.EACCES, errno.EFAULT,
    errno.EEXIST, errno.EINVAL, errno.EMFILE, errno.ENOSPC, errno.ENOSYS, errno.EPROTO, errno.EPROTONOSUPPORT,
    errno.EOPNOTSUPP, errno.ENOTCONN, errno.ESHUTDOWN, errno.ETIMEDOUT,
})  # fmt: skip
"""The errors that can answer a request (protocol, section 9)."""
OTHER: Final = "other"
"""Stands for every other error: a VMM's hypervisor may refuse with any."""


class RefusedRequests:
    """Of the whole daemon."""

    def __init__(self) -> None:
        self.counts: Counter[tuple[str, str]] = Counter()
        """By method and error."""

    def count(self, method: str, error: EncodedError) -> None:
        self.counts[method_word(method), error.name if error.number in _ERRORS else OTHER] += 1


def method_word(method: str) -> str:
    return method if method in METHODS else UNKNOWN


def warn_of_limit(uid: int, method: str, error: EncodedError, pace: LogPace) -> None:
    """If a limit was reached, say so: for a uid, a method and a limit once a minute."""
    limit = error.details.get("limit")
    if limit is None:
        return
    not_warned = pace.passed_over((method, limit))
    if not_warned is not None:
        log.warning(
            "request_refused", method=method, error=error.name, limit=limit, uid=uid, not_warned=not_warned
        )
