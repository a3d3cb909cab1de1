"""`interceptctl ls`, from its command line to its output."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest

from fakes.scripted_daemon import replies
from fakes.tool import (
    LATENCY,
    SILENT,
    WAITED,
    run_against,
    summary,
)
from intercept_protocol.messages import (
    PartitionList,
)


def test_ls_shows_a_line_a_partition(socket_path: Path) -> None:
    page = PartitionList(partitions=[summary(7), summary(12, "other")], more=False)

    result, _ = run_against(socket_path, replies(page), "ls")

    assert result.exit_code == 0
    above, heading, *lines = (line.split() for line in result.stdout.splitlines())
    assert above == ["AT", "ONCE", "WAITED"]
    assert heading == [
        *("ID", "NAME", "UID", "PID", "VPS", "MAPPED", "INTERCEPTS", "P50", "P99", "P50", "P99", "AGE")
    ]
    assert lines == [
        ["7", "guest", "1000", "4242", "2", "1", "GiB", "1234k", "2us", "16us", "8us", "16us", "1h02m"],
        ["12", "other", "1000", "4242", "2", "1", "GiB", "1234k", "2us", "16us", "8us", "16us", "1h02m"],
    ]


def test_ls_reads_page_after_page(socket_path: Path) -> None:
    pages = replies(
        PartitionList(partitions=[summary(1), summary(2)], more=True),
        PartitionList(partitions=[summary(9)], more=False),
    )

    result, daemon = run_against(socket_path, pages, "ls", "--json")

    assert [item["partition_id"] for item in json.loads(result.stdout)["partitions"]] == [1, 2, 9]
    assert [params for _, params in daemon.heard[1:]] == [[{"after": 0}], [{"after": 2}]]


def test_ls_gives_up_if_a_page_does_not_advance(socket_path: Path) -> None:
    result, _ = run_against(socket_path, replies(PartitionList(partitions=[], more=True)), "ls")

    assert result.exit_code == 3
    assert "list_partitions: page does not advance past 0x0" in result.stderr


def test_ls_without_partitions_says_so(socket_path: Path) -> None:
    result, _ = run_against(socket_path, replies(PartitionList(partitions=[], more=False)), "ls")

    assert result.stdout == "no partitions\n"


def test_ls_json_has_protocol_names_and_exact_numbers(socket_path: Path) -> None:
    page = PartitionList(partitions=[summary(7)], more=False)

    result, _ = run_against(socket_path, replies(page), "ls", "--json")

    assert json.loads(result.stdout) == {
        "partitions": [
            {
                "partition_id": 7,
                "name": "guest",
                "uid": 1000,
                "pid": 4242,
                "address_space": "declared",
                "hypervisor": "software",
                "vps": 2,
                "regions": 300,
                "mapped_gfns": 262144,
                "intercepts": 1234567,
                "invalidations": 5,
                "age_ms": 3725000,
                "latency": list(LATENCY),
                "latency_waited": list(WAITED),
                "watch": "declared",
                "open_invalidations": 0,
                "oldest_invalidation_ms": 0,
                "waiting_vps": 0,
                "memory_bytes": 0,
                "restore": "",
            }
        ]
    }


def test_a_name_that_would_steer_the_terminal_is_shown_escaped(socket_path: Path) -> None:
    page = PartitionList(partitions=[summary(7, "\x1b[2J[red]x")], more=False)

    result, _ = run_against(socket_path, replies(page), "ls")

    assert "\x1b" not in result.stdout
    assert r"\x1b[2J[red]x" in result.stdout


def test_ls_fits_80_columns_and_cuts_no_id_whatever_the_partitions_are(socket_path: Path) -> None:
    page = PartitionList(partitions=[summary(7, "n" * 64), summary(123_456_789, "模" * 64)], more=False)

    result, _ = run_against(socket_path, replies(page), "ls")

    assert max(len(line) for line in result.stdout.splitlines()) <= 80
    assert "123456789" in result.stdout


@pytest.mark.parametrize("name", ["n" * 30, "模" * 30])
def test_ls_cuts_a_long_name_with_an_ellipsis_and_not_a_number(socket_path: Path, name: str) -> None:
    result, _ = run_against(
        socket_path, replies(PartitionList(partitions=[summary(7, name)], more=False)), "ls"
    )

    _, _, *lines = (line.split() for line in result.stdout.splitlines())
    (cells,) = lines
    assert (cells[1][0], cells[1][-1]) == (name[0], "…")
    assert [cells[0], *cells[2:]] == [
        *("7", "1000", "4242", "2", "1", "GiB", "1234k", "2us", "16us", "8us", "16us", "1h02m")
    ]


def test_ls_says_which_partitions_have_nothing_mapped_and_what_a_missing_pid_means(
    socket_path: Path,
) -> None:
    silent = [
        msgspec.structs.replace(SILENT.summary, partition_id=number, watch=watch)
        for number, watch in [*((number, "none") for number in range(1, 11)), (11, "unattached")]
    ]
    page = PartitionList(partitions=[*silent, summary(12)], more=False)

    result, _ = run_against(socket_path, replies(page), "ls")

    _, _, *lines = result.stdout.splitlines()
    assert [line.split()[3] for line in lines[:12]] == ["-"] * 11 + ["4242"]
    assert " ".join(" ".join(lines[12:]).split()) == (
        "watch unattached, nothing is mapped before the VMM calls attach_memory: 11 "
        "watch none, nothing is mapped without a userfaultfd or promise_begin_end: 1, 2, 3, 4, 5, 6, 7, 8 "
        "and 2 more "
        "pid -: the process is in another pid namespace"
    )
    assert max(map(len, lines)) <= 80
