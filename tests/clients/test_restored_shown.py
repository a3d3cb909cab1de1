"""What `ls`, `show` and `stats` say of a guest that is restored."""

from __future__ import annotations

from pathlib import Path

import msgspec

from fakes.scripted_daemon import replies
from fakes.tool import INSPECTION, LATENCY, STATISTICS, run_against, summary
from intercept_protocol.messages import PartitionList, RestoreStatistics

RESTORE = RestoreStatistics(
    state="serving", image_pages=1 << 18, pages_in=51_200, demand_pages=800, around_pages=49_376,
    prefetched_pages=1024, zero_pages=256, removed_pages=512, faults=812, retries=4, image_errors=3,
    age_ms=2000, first_fault_ms=2, quiet_ms=1900, pid=4242, error="the image cannot be read: EIO",
    latency=LATENCY, oldest_fault_ms=12_000,
)  # fmt: skip


def test_ls_says_which_wait_for_a_vmm(socket_path: Path) -> None:
    waiting = msgspec.structs.replace(summary(7), pid=0, restore="waiting")

    result, _ = run_against(
        socket_path, replies(PartitionList(partitions=[waiting, summary(8)], more=False)), "ls"
    )

    _, _, *lines = result.stdout.splitlines()
    assert [line.split()[3] for line in lines[:2]] == ["-", "4242"]
    assert lines[2:] == ["", "waiting for a VMM, whose memory comes from a snapshot: 7"]


def test_show_says_what_a_restored_guest_has_and_waits_for(socket_path: Path) -> None:
    restored = msgspec.structs.replace(
        INSPECTION, statistics=msgspec.structs.replace(STATISTICS, restore=RESTORE)
    )

    result, _ = run_against(socket_path, replies(restored), "show", "7")

    start = result.stdout.index("restore: serving pid 4242: the image cannot be read: EIO\n")
    assert [line.rstrip() for line in result.stdout[start:].splitlines()[1:6]] == [
        "  200 MiB brought in of an image of 1 GiB, 1 MiB of it zero, 100 MiB/s so far",
        "  3.125 MiB on demand, 192.9 MiB around, 4 MiB prefetched",
        "  812 faults, P50 2us, P99 16us; the first after 2 ms, the last after 1900 ms",
        "  a fault has waited for 12s",
        "  tried again 4 times: the VMM's memory was changing",
    ]


def test_stats_have_the_counters_of_a_restore_under_their_names(socket_path: Path) -> None:
    restored = msgspec.structs.replace(
        INSPECTION, statistics=msgspec.structs.replace(STATISTICS, restore=RESTORE)
    )

    result, _ = run_against(socket_path, replies(restored), "stats", "7")

    _, _, shown = result.stdout.partition("\nrestore\n")
    facts = dict(line.split() for line in shown.splitlines())
    assert (facts["pages_in"], facts["oldest_fault_ms"], facts["retries"]) == ("51,200", "12,000", "4")
