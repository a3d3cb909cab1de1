"""Errors about one element of a list in a request.

Owns how such an error names the list and the element (E-2), whether it shows when the request is decoded or
when it is carried out. Must not know any method.
"""

from __future__ import annotations

import errno
from types import TracebackType

from .addresses import RangeError
from .errors import WireError


class about_element:  # lower case: it reads as a preposition, `with about_element("vmas", 3)`
    """A `WireError` or `RangeError` within concerns element `index`, from 0, of the list `name`.

    It becomes a `WireError` that says so. Its other details are those of a request with that one element. A
    class, because a generator would take 1 us of each element that is right, of the 5 that it takes in all.
    """

    __slots__ = ("_index", "_name")

    def __init__(self, name: str, index: int) -> None:
        self._name = name
        self._index = index

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, RangeError):
            error = WireError(errno.EINVAL, str(error), field=error.field)
        if isinstance(error, WireError):
            details = {**error.details, "list": self._name, "index": self._index}
            where = f"{self._name}[{self._index}]"
            raise WireError(error.number, f"{where}: {error.message}", **details) from None
