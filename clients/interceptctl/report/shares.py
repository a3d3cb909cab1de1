"""How much of the guest's memory it reaches, as a grid over time and gfns.

Owns the arithmetic. Must not know how it is drawn. A grid has the same size for any number of mappings.
"""

from __future__ import annotations

from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from .gfn_axis import GfnAxis
from .history import History

COLUMNS: Final = 400
ROWS: Final = 200

Numbers = npt.NDArray[Any]


class Shares(NamedTuple):
    """Of each cell: a row is `height` long on the axis of gfns, a column `width` ns; both begin at 0."""

    share: npt.NDArray[np.float32]
    height: float
    width: float


def mapped_shares(history: History, axis: GfnAxis) -> Shares | None:
    """None if nothing was mapped."""
    boxes = [box for box in history.mapped if box.until > box.since]
    if not boxes:
        return None
    starts, ends, since, until = (np.array([box[column] for box in boxes], np.float64) for column in range(4))
    starts, ends = axis.place(starts), axis.place(ends - 1) + 1
    rows = min(ROWS, axis.length)
    height, width = axis.length / rows, history.until / COLUMNS
    grid = np.zeros((rows + 2, COLUMNS + 2))
    for row, of_row in _edges(starts / height, ends / height, rows):
        for column, of_column in _edges(since / width, until / width, COLUMNS):
            np.add.at(grid, (row, column), of_row * of_column)
    share = grid.cumsum(0).cumsum(1)[:rows, :COLUMNS]
    return Shares(np.clip(share, 0, 1).astype(np.float32), height, width)


def _edges(start: Numbers, end: Numbers, cells: int) -> list[tuple[npt.NDArray[np.int64], Numbers]]:
    """Where to add how much, so that the running sum is the share of each cell that [start, end) covers."""
    edges = []
    for place, sign in ((end, 1.0), (start, -1.0)):
        cell = np.clip(np.floor(place), 0, cells).astype(np.int64)
        part = np.clip(place, 0, cells) - cell
        # cells before this one are whole, this one in part, those behind not at all
        edges += [
            (np.zeros_like(cell), np.full(len(cell), sign)),
            (cell, sign * (part - 1)),
            (cell + 1, -sign * part),
        ]
    return edges
