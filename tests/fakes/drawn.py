"""Hypothesis strategies for small page ranges, where collisions are likely, and for the order of tasks."""

from __future__ import annotations

from hypothesis import strategies as st

from intercept_protocol.addresses import PageRange

SPACE = 48
"""Pages of the small world that ranges are drawn from."""


def ranges(space: int = SPACE) -> st.SearchStrategy[PageRange]:
    """Half-open, never empty, within [0, space)."""
    return st.tuples(st.integers(0, space - 1), st.integers(1, space)).map(
        lambda drawn: PageRange(start=drawn[0], end=min(drawn[0] + drawn[1], space))
    )


def pauses(most: int = 4) -> st.SearchStrategy[list[int]]:
    """Checkpoints for `DrawnPauses`. Drawing them seeds the order in which trio runs what is ready, too."""
    checkpoints = st.lists(st.integers(0, most), min_size=1, max_size=12)
    return st.tuples(st.random_module(), checkpoints).map(lambda drawn: drawn[1])
