"""What is where in the guest's memory, and since when.

Owns the boxes that are complete once something goes, and how many pages there are. Must not know what is
there.
"""

from __future__ import annotations

from typing import NamedTuple

from interceptctl.page_map import PageMap

from .history import Box


class Held(NamedTuple):
    """What is there now."""

    start: int
    end: int
    since: int
    what: str
    start_page: int = 0

    def slice(self, start: int, end: int) -> Held:
        return self._replace(start=start, end=end, start_page=self.start_page + start - self.start)


class Layer:
    """What is where in the guest's memory: boxes when it goes, and how many pages there are."""

    def __init__(self, boxes: list[Box], pages: list[tuple[int, int]]) -> None:
        self.held: PageMap[Held] = PageMap()
        self._boxes = boxes
        self._pages = pages
        self._count = 0

    def put(self, held: Held) -> None:
        if held.start == held.end:
            return
        self._carve(held.start, held.end, held.since)
        self.held.put(held)
        self._counted(held.since, held.end - held.start)

    def fill(self, held: Held) -> None:
        """Where nothing is."""
        for start, end in self.held.gaps(held.start, held.end) if held.start < held.end else ():
            self.put(held.slice(start, end))

    def take(self, start: int, end: int, now: int) -> None:
        if start < end:
            self._carve(start, end, now)
            self._counted(now, 0)

    def clear(self, now: int) -> None:
        for held in self.held:
            self._boxes.append(Box(held.start, held.end, held.since, now, held.what))
        self.held = PageMap()
        self._counted(now, -self._count)

    def _carve(self, start: int, end: int, now: int) -> None:
        for held in self.held.clipped(start, end):
            self._boxes.append(Box(held.start, held.end, held.since, now, held.what))
            self._count -= held.end - held.start
        self.held.carve(start, end)

    def _counted(self, now: int, more: int) -> None:
        self._count += more
        if self._pages and self._pages[-1][0] == now:
            self._pages.pop()
        self._pages.append((now, self._count))
