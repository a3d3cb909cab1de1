"""`interceptctl show`, from its command line to its output."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest

from fakes.scripted_daemon import replies
from fakes.tool import (
    ANSWERED,
    INSPECTION,
    SILENT,
    run_against,
    summary,
)
from intercept_protocol.messages import (
    MappingPage,
    MappingView,
    MemoryWatch,
    PartitionInspection,
    RegionPage,
    VmaPage,
    VmaView,
)
from interceptctl import silence
from interceptd.address_space.refusals import Cause

WITHOUT_MORE = {"not_virgin", "not_offered", "long_name", "not_allowed", "refused_by_its_file", "other"}
"""Causes whose word says it, or that no fault meets."""


def test_show_prints_configuration_statistics_regions_and_virtual_processors(socket_path: Path) -> None:
    result, daemon = run_against(socket_path, replies(INSPECTION), "show", "7")

    assert daemon.heard[1:] == [("inspect_partition", [{"partition_id": 7}])]
    lines = [line.split() for line in result.stdout.splitlines()]
    assert ["owner", "uid", "1000,", "pid", "4242"] in lines
    assert ["mmio_granularity", "vma"] in lines
    assert ["stale_attempts", "1"] in lines
    assert ["regions:", "1", "of", "300", "shown"] in lines
    assert [
        "0x100000000-0x140000000",
        "0x7fff12345000",
        "movable",
        "populating",
        "rw-",
        *("1", "GiB", "1", "GiB"),
    ] in lines
    assert ["1", "waiting", "99"] in lines


@pytest.mark.parametrize("command", ["show", "stats"])
def test_latency_is_shown_apart_for_intercepts_answered_at_once_and_those_that_waited(
    socket_path: Path, command: str
) -> None:
    result, _ = run_against(socket_path, replies(INSPECTION), command, "7")

    lines = [line.split() for line in result.stdout.splitlines()]
    assert [line for line in lines if line in ANSWERED] == ANSWERED


@pytest.mark.parametrize("view", [INSPECTION, SILENT], ids=["live", "silent"])
def test_show_fits_80_columns(socket_path: Path, view: PartitionInspection) -> None:
    result, _ = run_against(socket_path, replies(view), "show", "7")

    assert max(len(line) for line in result.stdout.splitlines()) <= 80


def facts_of(path: Path, view: PartitionInspection) -> dict[str, str]:
    """What `show` says, name by name; a fact of several lines is in one."""
    result, _ = run_against(path, replies(view), "show", "7")
    facts: dict[str, str] = {}
    name = ""
    for line in result.stdout.split("\nstatistics")[0].splitlines()[1:]:
        start, text = line[2:20].strip(), line[20:].strip()
        name = start or name
        facts[name] = f"{facts[name]} {text}" if not start else text
    return facts


def test_show_says_why_nothing_is_mapped(socket_path: Path) -> None:
    facts = facts_of(socket_path, SILENT)

    assert facts["watch"] == (
        "none: nothing is mapped without a userfaultfd or promise_begin_end; the VMM was refused a "
        "userfaultfd (EPERM, as under a container's default seccomp profile)"
    )
    assert facts["hypervisor"] == "vmm: not connected, so no region can be added"
    assert facts["owner"] == "uid 1000, pid -: the process is in another pid namespace"
    assert facts["notifiers"] == "0"


def test_show_counts_what_was_not_mapped_by_cause(socket_path: Path) -> None:
    result, _ = run_against(socket_path, replies(SILENT), "show", "7")

    lines = [line.strip() for line in result.stdout.splitlines()]
    start = next(number for number, line in enumerate(lines) if line.startswith("NOT MAPPED"))
    assert [" ".join(line.split()) for line in lines[start + 1 : start + 3]] == [
        "unannounced neither a userfaultfd nor promise_begin_end 1,234",
        "no_answer the VMM's process did not answer in time 7",
    ]


def test_a_promise_cannot_be_kept_without_a_notifier() -> None:
    promised = msgspec.structs.replace(
        SILENT, summary=msgspec.structs.replace(SILENT.summary, watch="promised"), userfaultfd_errno=None
    )

    without, kept = promised, msgspec.structs.replace(promised, notifiers=1)
    promise = "promised: the VMM announces each change of its memory"
    assert silence.watch(without) == f"{promise}, but has no notifier connection to do it with"
    assert silence.watch(kept) == promise


def test_show_of_an_earlier_daemon_leaves_out_what_it_does_not_say(socket_path: Path) -> None:
    earlier = msgspec.structs.replace(INSPECTION, summary=msgspec.structs.replace(summary(7), watch=""))

    assert facts_of(socket_path, earlier).keys().isdisjoint({"watch", "notifiers"})


def test_every_cause_and_every_watch_has_its_sentence() -> None:
    assert {cause.word for cause in Cause} - silence.CAUSES.keys() == WITHOUT_MORE
    assert set(silence._WATCHES) == set(MemoryWatch)


def test_show_json_is_the_whole_inspection(socket_path: Path) -> None:
    result, _ = run_against(socket_path, replies(INSPECTION), "show", "7", "--json")

    shown = json.loads(result.stdout)
    assert list(shown) == [
        "summary",
        "architecture",
        "mmio_granularity",
        "statistics",
        "regions",
        "virtual_processors",
    ]
    assert shown["regions"][0]["start_uaddr"] == 0x7FFF_1234_5000


VMA = VmaView(
    start_uaddr=0x7000_0000, page_count=16, start_pfn=0xC0000, readable=True, writable=False, executable=True,
    io=True,
)  # fmt: skip
MAPPING = MappingView(
    start_gfn=0x100, page_count=4, start_uaddr=0x7000_0000, frame=("file 0:1:1374", 7), access=3
)
LISTS: dict[str, tuple[list[object], list[str], int]] = {
    "regions": (
        [RegionPage(regions=INSPECTION.regions, more=True), RegionPage(regions=[], more=False)],
        ["0x100000000-0x140000000", "0x7fff12345000", "movable", "populating", "rw-", *("1", "GiB") * 2],
        0x10_0000,
    ),
    "vmas": (
        [VmaPage(vmas=[VMA], more=True), VmaPage(vmas=[], more=False)],
        ["0x70000000-0x70010000", "0xc0000000", "r-x", "yes", "64", "KiB"],
        0x7000_0000,
    ),
    "mappings": (
        [MappingPage(mappings=[MAPPING], more=True), MappingPage(mappings=[], more=False)],
        ["0x100000-0x104000", "0x70000000", "file", "0:1:1374", "0x7", "rw-", "16", "KiB"],
        0x100,
    ),
}
"""By option: the pages, the line of the one element, and its key."""


@pytest.mark.parametrize("what", LISTS)
def test_show_pages_through_all_regions_vmas_or_mappings(socket_path: Path, what: str) -> None:
    pages, line, key = LISTS[what]
    result, daemon = run_against(socket_path, replies(*pages), "show", "7", f"--{what}")

    assert daemon.heard[1:] == [
        (f"list_{what}", [{"partition_id": 7}]),
        (f"list_{what}", [{"partition_id": 7, "after": key}]),
    ]
    assert [each.split() for each in result.stdout.splitlines()][1:] == [line]
    assert max(len(each) for each in result.stdout.splitlines()) <= 80


@pytest.mark.parametrize("what", LISTS)
def test_show_json_of_a_list_has_the_fields_of_the_protocol(socket_path: Path, what: str) -> None:
    pages, _, key = LISTS[what]
    result, _ = run_against(socket_path, replies(*pages), "show", "7", f"--{what}", "--json")

    [shown] = json.loads(result.stdout)[what]
    assert shown["start_uaddr" if what == "vmas" else "start_gfn"] == key
