"""Latency histograms: the buckets are QEMU's, and no recorded value is lost."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from intercept_protocol.messages import LATENCY_BUCKETS
from interceptd.telemetry.histogram import BOUNDARIES_NS, LatencyHistogram, total

LAST = LATENCY_BUCKETS - 1
DURATIONS = st.lists(st.integers(0, 2**63), max_size=50)


def bucket_of(nanoseconds: int) -> int:
    return recorded([nanoseconds]).buckets.index(1)


def recorded(durations: list[int]) -> LatencyHistogram:
    histogram = LatencyHistogram()
    for duration in durations:
        histogram.record(duration)
    return histogram


@pytest.mark.parametrize(
    ("nanoseconds", "bucket"),
    [
        (0, 0), (999, 0), (1_000, 0), (1_999, 0), (2_000, 1), (3_999, 1), (256_000, 8), (511_999, 8),
        (2**23 * 1_000 - 1, LAST - 1), (2**23 * 1_000, LAST), (2**63, LAST),
    ],
)  # fmt: skip
def test_duration_is_counted_where_qemu_counts_it(nanoseconds: int, bucket: int) -> None:
    assert bucket_of(nanoseconds) == bucket


@pytest.mark.parametrize("bucket", range(LAST))
def test_boundary_is_the_first_duration_of_the_next_bucket(bucket: int) -> None:
    assert (bucket_of(BOUNDARIES_NS[bucket] - 1), bucket_of(BOUNDARIES_NS[bucket])) == (bucket, bucket + 1)


@given(DURATIONS)
def test_histogram_counts_every_duration_once_and_sums_them(durations: list[int]) -> None:
    histogram = recorded(durations)

    assert len(histogram.buckets) == LATENCY_BUCKETS
    assert sum(histogram.buckets) == histogram.count == len(durations)
    assert histogram.total_ns == sum(durations)


@given(st.lists(DURATIONS, max_size=5))
def test_the_total_equals_a_single_histogram(parts: list[list[int]]) -> None:
    whole = total(recorded(part) for part in parts)
    at_once = recorded([duration for part in parts for duration in part])

    assert (whole.buckets, whole.total_ns) == (at_once.buckets, at_once.total_ns)
