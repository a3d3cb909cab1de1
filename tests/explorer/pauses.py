"""Where a port can pause, and what decides for how long.

Owns the names of the places. Must not know what the ports do.
"""

from __future__ import annotations

from enum import Enum
from typing import Protocol

from intercept_protocol.addresses import GfnRange
from interceptd.pages.mapping import Extent, Mapping

Asked = Mapping | GfnRange | Extent | int | None
"""What a port call is about: what to map or unmap, which page to resolve, or the answer to that."""


class Point(Enum):
    """A place inside a port call: before the work is done, or after it and before the caller sees it."""

    RESOLVE = "before resolve"
    RESOLVED = "after resolve"
    MAP = "before a map"
    MAPPED = "after a map"
    REFUSED = "after a map was refused"
    UNMAP = "before an unmap"
    UNMAPPED = "after an unmap"


class Pauses(Protocol):
    async def at(self, point: Point, asked: Asked) -> None:
        """Stop here, or do not."""
