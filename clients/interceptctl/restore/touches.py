"""Which pages a restored guest touches, from the trace that the daemon writes.

Owns the meaning of the records. Must not know files, nor when the ring is read.

A touch brings in its page and the neighbours around it. All of these belong to the working set: without them
the next guest would fault where this one did not.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import Final

from intercept_client import TraceRing
from intercept_protocol.messages import AROUND_LIMIT
from intercept_protocol.trace import NO_MEMORY, Kind, Traced, backing_number, records_of
from intercept_protocol.working_set import RUN, TouchedPages

ZERO: Final = backing_number("zero")
"""Behind a page that the VMM had given back: the guest does not want the image's content any more."""
BROUGHT_IN: Final = 64
"""How many ranges may be brought in between a range and the fault that it was for; others fault meanwhile."""


class Touches:
    """Drains `ring`, and collects the pages of an image that were touched, in order."""

    def __init__(self, ring: TraceRing, image_pages: int, prefetched: bytes) -> None:
        """The runs in `prefetched` come first: of pages that are in already, no touch is seen."""
        self.lost = 0
        """Records that were overwritten before they were read."""
        self.pages = TouchedPages(image_pages)
        for first_page, count in RUN.iter_unpack(prefetched):
            self.pages.add(first_page, count)
        self._ring = ring
        self._brought_in: deque[tuple[int, int]] = deque(maxlen=BROUGHT_IN)

    def drain(self) -> None:
        """Take what is new by now."""
        end, behind = self._ring.written, 0
        while behind < end:
            lost, first_number, stored = self._ring.read()
            records = records_of(first_number, stored)
            behind = first_number + len(records)
            self.lost += lost
            self._take(records)

    def _take(self, records: Iterable[Traced]) -> None:
        for record in records:
            if record.kind == Kind.GUEST_MAPPED:
                first_page, count, _, _, backing, _ = record.values
                if record.detail and backing != ZERO:  # else it is NO_ACCESS: nothing came in
                    self._brought_in.append((first_page, count))
            elif record.kind == Kind.INTERCEPT and not record.detail & NO_MEMORY:
                self._touched(record.values[0])

    def _touched(self, page: int) -> None:
        """Add what was brought in around `page`. What came for another reason lies elsewhere."""
        first, end = max(page - AROUND_LIMIT, 0), page + AROUND_LIMIT
        for _ in range(len(self._brought_in)):
            start, count = self._brought_in.popleft()
            if start < end and start + count > first:
                self.pages.add(max(start, first), min(start + count, end) - max(start, first))
            else:
                self._brought_in.append((start, count))
