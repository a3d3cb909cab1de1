"""Errors about one element of a list in a request.

Owns how such an error names the list and the element (E-2), whether it shows when the request is decoded or
when it is carried out. Must not know any method.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager

from .addresses import RangeError
from .errors import WireError


@contextmanager
def about_element(name: str, index: int) -> Iterator[None]:
    """A `WireError` or `RangeError` within concerns element `index`, from 0, of the list `name`.

    It becomes a `WireError` that says so. Its other details are those of a request with that one element.
    """
    try:
        yield
    except RangeError as error:
        raise _refusal(WireError(errno.EINVAL, str(error), field=error.field), name, index) from None
    except WireError as error:
        raise _refusal(error, name, index) from None


def _refusal(error: WireError, name: str, index: int) -> WireError:
    details = {**error.details, "list": name, "index": index}
    return WireError(error.number, f"{name}[{index}]: {error.message}", **details)
