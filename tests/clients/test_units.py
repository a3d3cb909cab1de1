"""Formatting numbers for narrow columns."""

from __future__ import annotations

import pytest

from interceptctl import units


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0"),
        (99_999, "99999"),
        (100_000, "100k"),
        (9_999_999, "9999k"),
        (10_000_000, "10M"),
        (2**63, "9223P"),
    ],
)
def test_count_stays_within_five_characters(number: int, text: str) -> None:
    assert units.count(number) == text


@pytest.mark.parametrize(
    ("page_count", "text"),
    [(0, "0 KiB"), (1, "4 KiB"), (384, "1.5 MiB"), (2**18, "1 GiB"), (2**52, "16 EiB")],
)
def test_pages_are_said_in_bytes(page_count: int, text: str) -> None:
    assert units.pages(page_count) == text


@pytest.mark.parametrize(
    ("milliseconds", "text"),
    [(999, "0s"), (59_999, "59s"), (750_000, "12m30s"), (11_100_000, "3h05m"), (1_483_200_000, "17d04h")],
)
def test_duration_has_the_two_largest_units(milliseconds: int, text: str) -> None:
    assert units.duration(milliseconds) == text


@pytest.mark.parametrize(
    ("number", "text"), [(0, "0 partitions"), (1, "1 partition"), (12_345, "12,345 partitions")]
)
def test_of_one_is_singular_and_thousands_are_separated(number: int, text: str) -> None:
    assert units.of(number, "partition") == text


def test_pages_are_a_half_open_range_of_bytes() -> None:
    assert units.span(0xFEB00, 16) == "0xfeb00000-0xfeb10000"
