"""The file of a working set: what is written is read again; anything else is refused by name."""

from __future__ import annotations

import struct
from hashlib import blake2b

import pytest
from hypothesis import given
from hypothesis import strategies as st

from intercept_protocol import working_set
from intercept_protocol.working_set import (
    HEADER,
    MAGIC,
    RUN,
    RUNS_LIMIT,
    SAMPLES,
    TouchedPages,
    WorkingSet,
    WorkingSetError,
    decode,
    digest_of,
    encode,
    page_count,
    sampled_pages,
)

DIGEST = bytes(range(32))


def stored(*runs: tuple[int, int]) -> bytes:
    return b"".join(RUN.pack(*run) for run in runs)


def pages_of(runs: bytes) -> list[int]:
    return [first + n for first, count in RUN.iter_unpack(runs) for n in range(count)]


FILE = encode(WorkingSet(100, DIGEST, stored((7, 3), (0, 1), (99, 1))))


def file(
    *, magic: bytes = MAGIC, version: int = 1, count: int = 0, pages: int = 9, rest: bytes = b""
) -> bytes:
    return HEADER.pack(magic, version, count, pages, DIGEST) + rest


def test_the_bytes_are_those_of_the_specification() -> None:
    assert FILE.hex() == (
        "494350544f554348" "01000000" "03000000" "6400000000000000" + DIGEST.hex() +
        "0700000003000000" "0000000001000000" "6300000001000000"
    )  # fmt: skip


def test_what_was_written_is_read_again() -> None:
    assert decode(FILE) == WorkingSet(100, DIGEST, stored((7, 3), (0, 1), (99, 1)))
    empty = WorkingSet(1, DIGEST, b"")
    assert decode(encode(empty)) == empty


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "not a working set"),
        (b"\x7fELF", "not a working set"),
        (file(magic=b"ICPTRACE"), "not a working set"),
        (FILE[:5], "cut off"),
        (FILE[: HEADER.size - 1], "cut off"),
        (FILE[:-1], "cut off"),
        (FILE + b"\0", "something follows the last page"),
        (file(version=2), "version 2; this program reads 1"),
        (file(count=RUNS_LIMIT + 1), f"{RUNS_LIMIT + 1} runs of pages, and at most {RUNS_LIMIT}"),
        (file(pages=0), "0 pages, which no image has"),
        (file(pages=1 << 32), "which no image has"),
        (file(count=1, rest=stored((3, 0))), "run 0, 0 pages from 3, is not within the image"),
        (file(count=1, rest=stored((8, 2))), "run 0, 2 pages from 8, is not within the image"),
        (file(count=2, rest=stored((8, 1), (0xFFFFFFFF, 0xFFFFFFFF))), "run 1"),
        (file(count=2, rest=stored((0, 9), (8, 1))), "10 pages, more than the image"),
    ],
)
def test_anything_else_is_refused_with_its_cause(data: bytes, why: str) -> None:
    with pytest.raises(WorkingSetError, match=why):
        decode(data)


@given(st.binary(max_size=200) | st.binary(max_size=64).map(lambda rest: FILE[: HEADER.size] + rest))
def test_no_bytes_are_read_as_pages_that_the_image_lacks(data: bytes) -> None:
    try:
        found = decode(data)
    except WorkingSetError:
        return
    assert encode(found) == data
    assert all(page < found.image_pages for page in pages_of(found.stored_runs))


@given(st.data())
def test_a_damaged_file_is_refused_or_still_within_its_image(data: st.DataObject) -> None:
    damaged = bytearray(FILE)
    damaged[data.draw(st.integers(0, len(FILE) - 1))] = data.draw(st.integers(0, 255))
    try:
        found = decode(bytes(damaged))
    except WorkingSetError:
        return
    assert page_count(found.stored_runs) <= found.image_pages


IMAGE = 40
_TOUCHES = st.lists(st.tuples(st.integers(0, IMAGE + 5), st.integers(0, IMAGE + 5)), max_size=12)


@given(_TOUCHES)
def test_each_page_is_kept_once_in_the_order_of_its_first_touch(touches: list[tuple[int, int]]) -> None:
    touched = TouchedPages(IMAGE)
    expected: dict[int, None] = {}
    for first, count in touches:
        touched.add(first, count)
        expected.update(dict.fromkeys(range(first, min(first + count, IMAGE))))
    runs = touched.stored_runs()
    assert pages_of(runs) == list(expected)
    assert touched.page_count == len(expected) == page_count(runs)
    assert decode(encode(WorkingSet(IMAGE, DIGEST, runs))).stored_runs == runs


def test_pages_that_follow_the_last_ones_are_of_the_same_run() -> None:
    touched = TouchedPages(IMAGE)
    for page in (3, 4, 5, 1, 0, 2):
        touched.add(page, 1)
    assert touched.stored_runs() == stored((3, 3), (1, 1), (0, 1), (2, 1))


def test_a_set_with_as_many_runs_as_are_allowed_counts_the_pages_that_it_lacks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(working_set, "RUNS_LIMIT", 2)
    touched = TouchedPages(IMAGE)
    for page in (0, 10, 20, 30, 11):
        touched.add(page, 1)
    assert touched.stored_runs() == stored((0, 1), (10, 2))
    touched.add(9, 5)
    assert touched.stored_runs() == stored((0, 1), (10, 4))
    assert (touched.page_count, touched.passed_over) == (5, 3)


@pytest.mark.parametrize("pages", [0, 1 << 32])
def test_an_image_that_no_file_can_name_is_refused(pages: int) -> None:
    with pytest.raises(ValueError, match=f"{pages} pages"):
        TouchedPages(pages)


@given(_TOUCHES)
def test_every_page_of_a_small_set_is_sampled_in_order(touches: list[tuple[int, int]]) -> None:
    touched = TouchedPages(IMAGE)
    for first, count in touches:
        touched.add(first, count)
    assert list(sampled_pages(touched.stored_runs())) == pages_of(touched.stored_runs())


def test_samples_of_a_large_set_lie_evenly_in_it() -> None:
    runs = stored((5000, 1000), (0, 3000), (9000, 4))
    sampled = list(sampled_pages(runs))
    places = [pages_of(runs).index(page) for page in sampled]
    assert len(sampled) == SAMPLES
    assert places == [number * 4004 // SAMPLES for number in range(SAMPLES)]


def test_the_digest_tells_images_of_other_content_or_size_apart() -> None:
    page = bytes(4096)
    other = struct.pack("<B4095x", 1)
    digests = {digest_of(2, [page, page]), digest_of(3, [page, page]), digest_of(2, [page, other])}
    assert len(digests) == 3
    said = blake2b((2).to_bytes(8, "little") + page + other, digest_size=32)
    assert digest_of(2, [page, other]) == said.digest()
