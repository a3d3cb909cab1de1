"""Calls that take several requests, each made from the answer before it.

Owns their form, a generator that both shells run, and paging through lists, which most of them do. Must not
know what is listed, nor do I/O.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Generator, Sequence
from typing import Any, Protocol, TypeVar

from intercept_protocol import messages
from intercept_protocol.errors import ProtocolViolation

from ._exchange import Exchange, call_exchange

Result = TypeVar("Result")
Item = TypeVar("Item")
Series = Generator[Exchange[Any], Any, Result]
"""Yields each request, is sent its reply, or thrown the refusal, and returns the result of the call."""


class Page(Protocol):
    """A reply with a part of a list."""

    @property
    def more(self) -> bool: ...


PageT = TypeVar("PageT", bound=Page)


def pages(
    ask: Callable[[int | None], messages.Call[PageT]],
    items: Callable[[PageT], Sequence[Item]],
    key: Callable[[Item], int],
) -> Series[list[Item]]:
    """A whole list, ordered by `key`, in as many requests as it takes.

    `ask` makes the request for what lies behind a key, or for the first page. Raises `ProtocolViolation` for
    a page that would be asked for forever.
    """
    listed: list[Item] = []
    after: int | None = None
    call = ask(None)
    while True:
        page: PageT = yield call_exchange(call)
        listed += items(page)
        if not page.more:
            return listed
        before, after = after or 0, key(listed[-1]) if listed else 0
        asked, call = call, ask(after)
        if call == asked or after < before or not items(page):
            why = f"{call.METHOD}: page does not advance past {before:#x}"
            raise ProtocolViolation(errno.EPROTO, why)
