"""OrderedMap against a dict, in chunks so small that few edits cut and join them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from interceptd.pages import ordered_map
from interceptd.pages.ordered_map import OrderedMap

CHUNK = 8
KEYS = st.integers(0, 30)
EDITS = st.lists(st.tuples(st.sampled_from(["put", "put", "take"]), KEYS), min_size=30, max_size=80)


@pytest.fixture(scope="module", autouse=True)
def small_chunks() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ordered_map, "CHUNK", CHUNK)
        yield


def edited(edits: list[tuple[str, int]]) -> tuple[OrderedMap[int], dict[int, int]]:
    """The edits made to a map and to its oracle."""
    items: OrderedMap[int] = OrderedMap()
    oracle: dict[int, int] = {}
    for number, (edit, key) in enumerate(edits):
        if edit == "put":
            items[key] = oracle[key] = number
        elif key in oracle:
            del items[key]
            del oracle[key]
    return items, oracle


@given(EDITS)
def test_any_edits_agree_with_a_sorted_dict(edits: list[tuple[str, int]]) -> None:
    items, oracle = edited(edits)
    assert list(items) == [oracle[key] for key in sorted(oracle)]
    assert len(items) == len(oracle)


@given(EDITS, KEYS)
def test_floor_answers_with_the_greatest_key_at_or_below(edits: list[tuple[str, int]], key: int) -> None:
    items, oracle = edited(edits)
    below = [held for held in oracle if held <= key]
    assert items.floor(key) == (oracle[max(below)] if below else None)


@given(EDITS, KEYS)
def test_get_answers_for_just_this_key(edits: list[tuple[str, int]], key: int) -> None:
    items, oracle = edited(edits)
    assert items.get(key) == oracle.get(key)


@given(EDITS, KEYS)
def test_the_next_one_is_that_of_the_least_key_above(edits: list[tuple[str, int]], key: int) -> None:
    items, oracle = edited(edits)
    above = [held for held in oracle if held > key]
    assert items.floor_and_next(key) == (items.floor(key), oracle[min(above)] if above else None)


@given(EDITS.filter(lambda edits: edited(edits)[1]), st.data())
def test_an_entry_moves_to_any_key_before_the_next_one(
    edits: list[tuple[str, int]], data: st.DataObject
) -> None:
    items, oracle = edited(edits)
    key = data.draw(st.sampled_from(sorted(oracle)))
    to = data.draw(st.integers(key, min((held for held in oracle if held > key), default=key + 5) - 1))
    del oracle[key]
    oracle[to] = -1
    items.move(key, to, -1)
    assert list(items) == [oracle[key] for key in sorted(oracle)]
    assert len(items) == len(oracle)
    assert [items.get(key) for key in oracle] == list(oracle.values())
    below = [held for held in oracle if held < to]
    assert items.floor(to - 1) == (oracle[max(below)] if below else None)


@given(EDITS, KEYS, KEYS)
def test_between_gives_the_keys_from_start_to_before_end(
    edits: list[tuple[str, int]], start: int, end: int
) -> None:
    items, oracle = edited(edits)
    assert list(items.between(start, end)) == [oracle[key] for key in sorted(oracle) if start <= key < end]


@given(EDITS)
def test_chunks_stay_within_their_size_and_none_is_empty(edits: list[tuple[str, int]]) -> None:
    items, _ = edited(edits)
    assert all(0 < len(keys) <= CHUNK for keys in items._keys)
    assert list(items._firsts) == [keys[0] for keys in items._keys]


def test_a_map_that_was_large_once_has_few_chunks_again() -> None:
    items, _ = edited([("put", key) for key in range(512)])
    for key in range(512):
        if key % 16:
            del items[key]
    assert len(items._keys) <= 32 // (CHUNK // 4)


@given(EDITS, st.data())
def test_pop_takes_out_what_it_returns_and_nothing_else(
    edits: list[tuple[str, int]], data: st.DataObject
) -> None:
    items, oracle = edited([*edits, ("put", 0)])
    key = data.draw(st.sampled_from(sorted(oracle)))
    assert items.pop(key) == oracle.pop(key)
    assert list(items) == [oracle[key] for key in sorted(oracle)]


@pytest.mark.parametrize("held", [[], [5], [9], list(range(0, 40, 2))])
@pytest.mark.parametrize("absent", [1, 3, 7])
def test_a_missing_key_is_a_key_error_and_changes_nothing(held: list[int], absent: int) -> None:
    items, oracle = edited([("put", key) for key in held])
    with pytest.raises(KeyError):
        del items[absent]
    assert list(items) == list(oracle.values())


def beside_a_full_chunk() -> OrderedMap[int]:
    """A first chunk with one key, 3, and one that has no room for it, from 4 on."""
    items, _ = edited([*(("put", key) for key in range(4 + CHUNK)), *(("take", key) for key in range(3))])
    assert [len(keys) for keys in items._keys] == [1, CHUNK], "a chunk is not joined to one without room"
    return items


def test_a_chunk_whose_neighbour_is_full_is_not_merged() -> None:
    items = beside_a_full_chunk()
    assert (items.floor(2), items.floor(3), items.floor(4)) == (None, 3, 4)


def test_below_the_first_key_is_nothing_after_the_first_chunk_is_deleted() -> None:
    items = beside_a_full_chunk()
    del items[3]
    assert (items.floor(3), items.get(3), items.floor(4)) == (None, None, 4)


def test_a_map_without_entries_has_no_key() -> None:
    empty: OrderedMap[str] = OrderedMap()

    assert (empty.get(3), empty.floor(3), len(empty)) == (None, None, 0)
