"""Page ranges whose ends count how often they are compared.

Whatever an index stores, only comparisons with the asked range tell it what overlaps. So they count what a
search looks at, with no clock.
"""

from __future__ import annotations

from typing import Generic, TypeVar

from intercept_protocol.addresses import PageRange

Range = TypeVar("Range", bound=PageRange)


class Bound(int):
    """A page number that counts its comparisons."""

    compared = 0

    def __lt__(self, other: int) -> bool:
        self.compared += 1
        return int(self) < other

    def __le__(self, other: int) -> bool:
        self.compared += 1
        return int(self) <= other

    def __gt__(self, other: int) -> bool:
        self.compared += 1
        return int(self) > other

    def __ge__(self, other: int) -> bool:
        self.compared += 1
        return int(self) >= other


class Counted(Generic[Range]):
    """`pages`, to be asked for; `looks` says how often its ends were compared."""

    def __init__(self, pages: Range) -> None:
        self._start, self._end = Bound(pages.start), Bound(pages.end)
        self.pages = pages.slice(self._start, self._end)

    @property
    def looks(self) -> int:
        return self._start.compared + self._end.compared
