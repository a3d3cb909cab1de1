"""What a recording says happened, as columns and boxes to draw.

Owns the values. Must not know how they are read, nor how they are drawn. Times are in ns since the recording
began. Intercepts stay in arrays: there may be millions.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from intercept_protocol.outcomes import Access
from intercept_protocol.recording import Header
from interceptctl.page_map import Span

STAGES: Final = ("total", "decode", "wait", "resolve", "map")

IMAGE_BACKINGS: Final = ("image", "zero")
"""What stands behind a restored guest's pages: `zero` where its VMM gave one back."""
Whole = npt.NDArray[np.int64]


class Box(NamedTuple):
    """Something about the gfns [start, end) that held for a while."""

    start: int
    end: int
    since: int
    until: int
    what: str


class Invalidation(NamedTuple):
    """Of pages of the VMM, and which gfns that were."""

    number: int
    since: int
    until: int
    source: str
    start_page: int
    page_count: int
    gfns: Sequence[Span]


class Hole(NamedTuple):
    """`lost` records are missing here; None: another daemon took over, and nobody knows."""

    number: int
    lost: int | None
    since: int
    until: int


class Change(NamedTuple):
    """Of the guest's table, which is made under the region lock; without access, an unmap."""

    number: int
    time: int
    start: int
    page_count: int
    access: Access


class Intercepts(NamedTuple):
    """A column for each fact; the n-th intercept has the n-th of each. gfns where `memory` says so."""

    number: Whole
    time: Whole
    vp: Whole
    answer: Whole
    access: Whole
    memory: npt.NDArray[np.bool_]
    gfn: npt.NDArray[np.uint64]
    stages: dict[str, Whole]
    """ns of each of `STAGES`."""


@dataclass
class History:
    header: Header
    intercepts: Intercepts
    records: int = 0
    until: int = 0
    end: str | None = None
    """Why the recording ended; None if it was cut off."""
    regions: list[Box] = field(default_factory=list)
    mapped: list[Box] = field(default_factory=list)
    region_pages: list[tuple[int, int]] = field(default_factory=list)
    """Since when how many pages were in regions."""
    mapped_pages: list[tuple[int, int]] = field(default_factory=list)
    invalidations: list[Invalidation] = field(default_factory=list)
    passes: list[tuple[int, int, int]] = field(default_factory=list)
    """From the oldest of so many invalidations to when the guest no longer reached what they covered."""
    changes: list[Change] = field(default_factory=list)
    holes: list[Hole] = field(default_factory=list)
    brought_in: Counter[str] = field(default_factory=Counter)
    """Of a guest whose memory comes from an image: pages that came in, by `IMAGE_BACKINGS`."""

    def answer(self, code: int) -> str:
        return " ".join(self.header.answers[code])
