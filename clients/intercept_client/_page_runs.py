"""Disjoint runs of pages, each with the pages that stand behind it.

Owns finding the run of a page, and keeping runs disjoint; must not know what the pages are. Not thread-safe.
"""

from __future__ import annotations

import msgspec
from sortedcontainers import SortedDict

from intercept_protocol.addresses import PageRange
from intercept_protocol.outcomes import Access


class PageRun(msgspec.Struct, frozen=True, eq=False, gc=False):
    """Page k of `pages` has page k from `behind` on behind it. `access` is what may be done with them."""

    pages: PageRange
    behind: int
    access: Access

    def part(self, start: int, end: int) -> PageRun:
        """The pages [start, end), which must lie in this run."""
        return PageRun(self.pages.slice(start, end), self.page_behind(start), self.access)

    def page_behind(self, page: int) -> int:
        return page - self.pages.start + self.behind


class PageRuns:
    """By their first page."""

    def __init__(self) -> None:
        self._by_start: SortedDict[int, PageRun] = SortedDict()

    def find(self, page: int) -> PageRun | None:
        run = self._last_from(page)
        return run if run is not None and page in run.pages else None

    def insert(self, run: PageRun) -> None:
        """Leaves out a run that overlaps another."""
        other = self._last_from(run.pages.end - 1)
        if other is None or not other.pages.overlaps(run.pages):
            self._by_start[run.pages.start] = run

    def discard(self, run: PageRun) -> None:
        """Take out this very run, if it is in: not another of the same pages."""
        if self._by_start.get(run.pages.start) is run:
            del self._by_start[run.pages.start]

    def discard_at(self, start: int) -> None:
        """Take out the run that begins at `start`, if one does."""
        self._by_start.pop(start, None)

    def carve(self, pages: PageRange) -> None:
        """Take out `pages`, of as many runs as they lie in; the rest of each stays."""
        while (run := self._last_from(pages.end - 1)) is not None and run.pages.overlaps(pages):
            del self._by_start[run.pages.start]
            if run.pages.start < pages.start:
                self.insert(run.part(run.pages.start, pages.start))
            if pages.end < run.pages.end:
                self.insert(run.part(pages.end, run.pages.end))

    def _last_from(self, page: int) -> PageRun | None:
        """The last run that begins at `page` or before."""
        index = self._by_start.bisect_right(page)
        return self._by_start.peekitem(index - 1)[1] if index else None
