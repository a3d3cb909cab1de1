"""A run held against a stored one: which ratios to the floor moved, and what cannot be held against anything.

Owns by how much is too much. Must not know how anything was measured.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from report import Rounds, floor_of, ratio
from running import Place

MOVED = 1.25
"""By how much a ratio may differ between two runs of the same code on a machine that does other things."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """`lines` are for people; `slower` is whether something moved for the worse, or nothing could be said."""

    lines: list[str]
    slower: bool


def compared(results: Mapping[str, Rounds], before: Mapping[str, Rounds]) -> Comparison:
    """Ratios are held against each other, never times: each to the floor of its own run.

    What was not pinned is reported but not judged: which CPU wakes which changes a ratio by half.
    """
    lines: list[str] = []
    slower, held = False, 0
    for title, figures in results.items():
        stored = before.get(title, {})
        if stored and floor_of(figures) != floor_of(stored):
            lines.append(f"{title}: the floor is {floor_of(figures)}, and was {floor_of(stored)}: not held")
            continue
        lines += [f"{title}: {name}: not in both runs" for name in _in_one(figures, stored)]
        for name in figures:
            if name in stored:
                held += 1
                change = ratio(figures, name, "p50") / ratio(stored, name, "p50")
                if not 1 / MOVED < change < MOVED:
                    slower |= change > 1 and title.endswith(Place.ONE_CPU.value)
                    lines.append(
                        f"{title}: {name}: the median is {change:.2f} of what it was, beside the floor"
                    )
    if not held:
        return Comparison([*lines, "nothing could be held against the baseline"], slower=True)
    return Comparison([*lines, f"{'slower' if slower else 'no slower'} than the baseline"], slower)


def _in_one(figures: Rounds, stored: Rounds) -> Iterator[str]:
    return (name for name in {**figures, **stored} if name not in figures or name not in stored)
