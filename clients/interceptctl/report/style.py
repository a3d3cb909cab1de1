"""How figures look: colours, text, numbers.

Owns that text from a recording is shown as it is: plotly reads part of HTML in names and hover texts. Must
not know what is drawn.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import numpy.typing as npt

from intercept_protocol.text import visible

from .history import STAGES, History

_OUTCOME_COLOURS: Final = {
    "resume": ("#0072b2", "#56b4e9"),
    "forward": ("#009e73", "#66c2a4", "#1b7837", "#a6d854"),
    "retry": ("#e69f00", "#f0c04f", "#b8860b", "#d9b38c", "#8c6d1f"),
    "fail": ("#d62728", "#ff7f7f"),
}  # fmt: skip
"""Shades of one hue for each outcome. The hues stay distinct under colour blindness."""
_UNKNOWN_OUTCOME: Final = ("#cc79a7",)
INVALIDATION: Final = "#cc79a7"
REGION: Final = "#888888"
REGIONS: Final = {"mmio": "#a6761d", "movable": REGION, "pinned": "#7570b3"}
STAGE_COLOURS: Final = dict(zip(STAGES, ("#888888", "#56b4e9", "#e69f00", "#009e73", "#cc79a7"), strict=True))
HEX: Final = "#x"

Numbers = npt.NDArray[Any]


def literal(text: str) -> str:
    """Text that plotly shows as it is, cut to a length that fits."""
    shown = visible(text[:80])
    for char in "&<>%\"'":
        shown = shown.replace(char, f"&#{ord(char)};") if char != "&" else shown.replace("&", "&amp;")
    return shown


def colour(history: History, code: int) -> str:
    """Of an answer."""
    outcome = history.header.answers[code][0]
    alike = [each for each, (other, _) in enumerate(history.header.answers) if other == outcome]
    colours = _OUTCOME_COLOURS.get(outcome, _UNKNOWN_OUTCOME)
    return colours[alike.index(code) % len(colours)]


def small(values: Numbers) -> Numbers:
    """Whole numbers in the smallest type that JavaScript has an array of."""
    if values.size and values.min() >= 0:
        for kind in (np.uint8, np.uint16, np.uint32):
            if values.max() <= np.iinfo(kind).max:
                return values.astype(kind)
    return values.astype(np.float64)


def together(*columns: Numbers) -> Numbers:
    """One row for each point: what a hover text says of it."""
    return small(np.stack(columns, 1))
