"""The timeline of a schedule: the VMM and its guest on the left, the daemon on the right.

Owns the lines and their words. Must not know what is wrong.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from intercept_protocol.addresses import GfnRange
from intercept_protocol.outcomes import Access
from interceptd.pages.mapping import Extent, Mapping

from .pauses import Asked, Point
from .script import rights


class Side(Enum):
    VMM = "the VMM and its guest"
    DAEMON = "who decides its intercepts"


@dataclass(frozen=True, slots=True)
class Line:
    step: int
    side: Side
    who: str
    what: str

    def __str__(self) -> str:
        return f"{self.who}: {self.what}"


class Story:
    """Collects lines where they are `wanted`; a search wants none."""

    def __init__(self, *, wanted: bool) -> None:
        self.wanted = wanted
        self.given: list[str] = []
        self.lines: list[Line] = []
        self._has_begun = False

    def begins(self) -> None:
        """What is recorded from here on happens step by step."""
        self._has_begun = True

    def tell(self, step: int, side: Side, who: str, what: str, *of: object) -> None:
        if not self.wanted:
            return
        told = what.format(*of)
        if self._has_begun:
            self.lines.append(Line(step, side, who, told))
        elif side is Side.VMM:
            self.given.append(told)

    def up_to(self, step: int) -> Sequence[Line]:
        """The lines until that step's end."""
        return [line for line in self.lines if line.step <= step]


def port_call(point: Point, asked: Asked) -> str:
    """A call of an address space or a hypervisor, before it or after it."""
    match point, asked:
        case Point.RESOLVE, int(page):
            return f"asks what is behind page {page}"
        case Point.RESOLVED, Extent(uaddrs, frame, access):
            last = uaddrs.end - 1
            pages = f"pages {uaddrs.start}-{last}" if last > uaddrs.start else f"page {last}"
            return f"finds {pages} at pfn {frame.page} {rights(access)}"
        case Point.RESOLVED, None:
            return "finds nothing there"
        case Point.MAP, Mapping() as mapping:
            return f"calls map_gpa {_mapping(mapping)}"
        case Point.MAPPED, Mapping() as mapping:
            return f"has mapped {_gfns(mapping.gfns)}"
        case Point.REFUSED, Mapping() as mapping:
            return f"is refused the map of {_gfns(mapping.gfns)}"
        case Point.UNMAP, GfnRange() as gfns:
            return f"calls unmap_gpa {_gfns(gfns)}"
        case Point.UNMAPPED, GfnRange() as gfns:
            return f"has unmapped {_gfns(gfns)}"
        case _:
            raise AssertionError(f"{point} of {asked}")


def _mapping(mapping: Mapping) -> str:
    if mapping.frame is None or mapping.access is Access.NONE:
        return f"{_gfns(mapping.gfns)} NO_ACCESS"
    return f"{_gfns(mapping.gfns)} to pfn {mapping.frame.page} {rights(mapping.access)}"


def _gfns(gfns: GfnRange) -> str:
    return f"gfns {gfns.start}-{gfns.end - 1}" if gfns.page_count > 1 else f"gfn {gfns.start}"
