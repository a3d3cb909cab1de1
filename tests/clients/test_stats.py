"""`interceptctl stats`, from its command line to its output."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec

from fakes.scripted_daemon import replies
from fakes.tool import (
    ANSWERED,
    DAEMON,
    INSPECTION,
    LATENCY,
    WAITED,
    run_against,
)


def test_stats_are_the_daemons(socket_path: Path) -> None:
    result, daemon = run_against(socket_path, replies(DAEMON), "stats")

    assert daemon.methods == ["hello", "statistics"]
    lines = [line.split() for line in result.stdout.splitlines()]
    assert ["partitions_created", "3"] in lines
    assert ["resume", "mapped", "516"] in lines


def test_stats_show_quantiles_of_the_latency_histogram(socket_path: Path) -> None:
    counted = msgspec.structs.replace(DAEMON, latency=LATENCY, latency_waited=WAITED)

    result, _ = run_against(socket_path, replies(counted), "stats")

    lines = [line.split() for line in result.stdout.splitlines()]
    assert [line for line in lines if line in ANSWERED] == ANSWERED


def test_stats_of_a_daemon_without_histograms_show_no_latency(socket_path: Path) -> None:
    result, _ = run_against(socket_path, replies(DAEMON), "stats")

    assert "p50" not in result.stdout


def test_stats_of_a_partition_are_its_own(socket_path: Path) -> None:
    result, daemon = run_against(socket_path, replies(INSPECTION), "stats", "7", "--json")

    assert daemon.methods == ["hello", "inspect_partition"]
    shown = json.loads(result.stdout)
    assert shown["stale_attempts"] == 1
    assert shown["intercepts"]["forward"] == {"no_region": 11}
