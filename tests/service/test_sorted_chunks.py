"""SortedChunks against a sorted list, in chunks so small that few edits cut them; how much an edit moves."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from interceptd.pages import sorted_chunks
from interceptd.pages.sorted_chunks import CHUNK, SortedChunks

Number = tuple[int]


def number(item: int) -> Number:
    return (item,)


@pytest.fixture
def small_chunks() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sorted_chunks, "CHUNK", 8)
        yield


@pytest.mark.usefixtures("small_chunks")
@given(st.lists(st.integers(0, 60), min_size=1, max_size=80))
def test_any_edits_agree_with_a_sorted_list(edits: list[int]) -> None:
    """A number that is there is removed, one that is not is added; one beyond all stays."""
    kept: SortedChunks[int, Number] = SortedChunks.of(100)
    oracle = {100}
    for edit in edits:
        if edit in oracle:
            kept.remove(number(edit), number)
        else:
            kept.add(edit, number)
        oracle ^= {edit}
        assert list(kept) == sorted(oracle)
        assert list(reversed(kept)) == sorted(oracle, reverse=True)
        assert kept.last == max(oracle)
        assert kept.only == (100 if len(oracle) == 1 else None)


@pytest.mark.parametrize("missing", [3, 7])
def test_what_is_not_there_cannot_be_removed(missing: int) -> None:
    kept: SortedChunks[int, Number] = SortedChunks.of(5)
    with pytest.raises(AssertionError):
        kept.remove(number(missing), number)


def test_an_edit_moves_no_more_than_a_chunk() -> None:
    """Whatever lies behind it: a million removals at the front moved a million items each."""
    kept: SortedChunks[int, Number] = SortedChunks.of(0)
    for item in range(1, 8 * CHUNK):
        kept.add(item, number)
    assert max(len(chunk) for chunk in kept._chunks) <= CHUNK


def test_what_is_removed_leaves_no_empty_chunk() -> None:
    kept: SortedChunks[int, Number] = SortedChunks.of(0)
    for item in range(1, 4 * CHUNK):
        kept.add(item, number)
    assert len(kept._chunks) > 4
    for item in range(4 * CHUNK - 1):
        kept.remove(number(item), number)
    assert (kept._chunks, kept.only) == ([[4 * CHUNK - 1]], 4 * CHUNK - 1)
