"""An axis of gfns that leaves out the long stretches in which nothing is.

Owns which stretches those are: a guest has its RAM at both sides of a hole, and devices far above it. Must
not know what is drawn. The page's script names the gfns along the axis, from `parts`.
"""

from __future__ import annotations

from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from .history import History

PARTS: Final = 64
"""At most so many are set apart."""
CUT: Final = 0.05
"""A stretch is left out if it is longer than this share of what is there."""
SPACE: Final = 0.03
"""Between two parts, as a share of what is there."""

Numbers = npt.NDArray[Any]


class Part(NamedTuple):
    """`page_count` gfns from `start` on, which are at `place` and above."""

    place: int
    start: int
    page_count: int


class GfnAxis:
    def __init__(self, history: History) -> None:
        self.parts = _parts(*_covered(history))
        self._starts = np.array([part.start for part in self.parts], np.float64)
        self._places = np.array([part.place for part in self.parts], np.float64)

    @property
    def length(self) -> int:
        last = self.parts[-1]
        return last.place + last.page_count

    def place(self, gfns: Numbers) -> Numbers:
        """Where they are. Each is in a part."""
        part = np.searchsorted(self._starts, gfns, "right") - 1
        return gfns - self._starts[part] + self._places[part]


def _covered(history: History) -> tuple[Numbers, Numbers]:
    """[start, end) of all that has gfns, by ascending start."""
    found = history.intercepts
    gfns = np.unique(found.gfn[found.memory]).astype(np.float64)
    boxes = np.array(
        [(box.start, box.end) for boxes in (history.regions, history.mapped) for box in boxes], np.float64
    ).reshape(-1, 2)
    starts, ends = np.concatenate([gfns, boxes[:, 0]]), np.concatenate([gfns + 1, boxes[:, 1]])
    order = np.argsort(starts, kind="stable")
    return starts[order], np.maximum.accumulate(ends[order])


def _parts(starts: Numbers, ends: Numbers) -> list[Part]:
    if not len(starts):
        return [Part(0, 0, 1)]
    gaps = np.maximum(starts[1:] - ends[:-1], 0)
    there = ends[-1] - starts[0] - gaps.sum()
    longest = np.argsort(-gaps, kind="stable")[: PARTS - 1]
    cuts = np.sort(longest[gaps[longest] > max(1.0, CUT * there)])
    space = max(1, int(SPACE * there))
    parts, place = [], 0
    for first, last in zip([0, *(cuts + 1)], [*cuts, len(starts) - 1], strict=True):
        part = Part(place, int(starts[first]), int(ends[last] - starts[first]))
        parts.append(part)
        place += part.page_count + space
    return parts
