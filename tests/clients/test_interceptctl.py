"""The operator's tool, from its command line to its output and exit code."""

from __future__ import annotations

import errno
import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import click
import msgpack
import msgspec
import pytest
from click.testing import CliRunner, Result

import interceptd
from fakes.scripted_daemon import HangUp, Hear, Look, Refuse, Say, ScriptedDaemon, Step, hello, replies
from intercept_protocol.errors import WireError
from intercept_protocol.messages import (
    Architecture,
    DaemonStatistics,
    MappingPage,
    MappingView,
    MemoryWatch,
    MmioGranularity,
    PartitionInspection,
    PartitionList,
    PartitionStatistics,
    PartitionSummary,
    RegionKind,
    RegionPage,
    RegionView,
    VmaPage,
    VmaView,
    VpView,
)
from interceptctl import operator_client, silence
from interceptctl.cli import main
from interceptd.address_space.refusals import Cause

LATENCY = (97, 0, 1, 3, *[0] * 20)
WAITED = (0, 0, 1, 1, *[0] * 20)
"""Two of 101; of the others 97 took less than 2 us, and two up to 16 us."""
ANSWERED = [
    ["answered", "at", "once", "p50", "<=", "2us,", "p99", "<=", "16us"],
    ["waited", "p50", "<=", "8us,", "p99", "<=", "16us"],
]


def summary(partition_id: int, name: str = "guest") -> PartitionSummary:
    return PartitionSummary(
        partition_id=partition_id,
        name=name,
        uid=1000,
        pid=4242,
        address_space="declared",
        hypervisor="software",
        vps=2,
        regions=300,
        mapped_gfns=262144,
        intercepts=1_234_567,
        invalidations=5,
        age_ms=3_725_000,
        latency=LATENCY,
        latency_waited=WAITED,
        watch="declared",
    )


STATISTICS = PartitionStatistics(
    regions=300,
    vmas=4,
    vps=2,
    open_invalidations=1,
    mapped_gfns=262144,
    no_access_gfns=512,
    slat_extents=12,
    map_calls=516,
    unmap_calls=3,
    deposits=2,
    invalidations=5,
    stale_attempts=1,
    intercepts={"resume": {"mapped": 516, "already_mapped": 7}, "forward": {"no_region": 11}},
    latency=LATENCY,
    latency_waited=WAITED,
)
INSPECTION = PartitionInspection(
    summary=summary(7),
    architecture=Architecture.X86_64,
    mmio_granularity=MmioGranularity.VMA,
    statistics=STATISTICS,
    regions=[
        RegionView(
            start_gfn=0x10_0000,
            page_count=0x4_0000,
            start_uaddr=0x7FFF_1234_5000,
            kind=RegionKind.MOVABLE,
            state="populating",
            writable=True,
            executable=False,
            mapped_gfns=262144,
        )
    ],
    virtual_processors=[VpView(vp_index=1, state="waiting", intercepts=99)],
)
DAEMON = DaemonStatistics(
    uptime_ms=1000,
    partitions=1,
    vps=2,
    connections=4,
    connections_without_hello=0,
    tasks=9,
    partitions_created=3,
    partitions_lost=0,
    connections_refused=1,
    intercepts={"resume": {"mapped": 516}},
    invalidations=5,
)
HUGE = 2**64 - 1
WITHOUT_MORE = {"not_virgin", "not_offered", "long_name", "not_allowed", "refused_by_its_file", "other"}
"""Causes whose word says it, or that no fault meets."""
CLIENTS = Path(__file__).parents[2] / "clients" / "README.md"


def run(path: Path, *arguments: str) -> Result:
    return CliRunner().invoke(main, ["--socket", str(path), *arguments])


def run_against(path: Path, steps: list[Step], *arguments: str) -> tuple[Result, ScriptedDaemon]:
    with ScriptedDaemon(path, ([*hello(), *steps],)) as daemon:
        return run(path, *arguments), daemon


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
            }
        ]
    }


def test_a_name_that_would_steer_the_terminal_is_shown_escaped(socket_path: Path) -> None:
    page = PartitionList(partitions=[summary(7, "\x1b[2J[red]x")], more=False)

    result, _ = run_against(socket_path, replies(page), "ls")

    assert "\x1b" not in result.stdout
    assert r"\x1b[2J[red]x" in result.stdout


def test_a_refusal_that_would_steer_the_terminal_is_shown_escaped(socket_path: Path) -> None:
    hostile = msgpack.packb([1, 2, [2, "ENOENT", "no \x1b[2J\u202e", {}], None])
    result, _ = run_against(socket_path, [Hear(), Say(hostile)], "stats")
    assert "no \\x1b[2J\\u202e" in result.stderr
    assert result.stderr.replace("\n", "").isprintable()


def test_a_path_that_is_not_utf8_is_shown_escaped(tmp_path: Path) -> None:
    result = run(tmp_path / "\udcff\x1b", "ls")
    assert (result.exit_code, "\\udcff\\x1b: no such file" in result.stderr) == (3, True)


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


SILENT = msgspec.structs.replace(
    INSPECTION,
    summary=msgspec.structs.replace(
        summary(7), pid=0, address_space="process", hypervisor="vmm", watch="none", mapped_gfns=0
    ),
    statistics=msgspec.structs.replace(STATISTICS, unresolved={"unannounced": 1234, "no_answer": 7}),
    notifiers=0,
    hypervisor_connected=False,
    userfaultfd_errno=errno.EPERM,
)
"""Live, and nothing is mapped."""


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


def test_policy_set_sets_the_granularity_and_confirms(socket_path: Path) -> None:
    result, daemon = run_against(
        socket_path, replies(None), "policy", "set", "7", "--mmio-granularity", "page"
    )

    assert daemon.heard[1:] == [("set_policy", [{"partition_id": 7, "mmio_granularity": "page"}])]
    assert result.stdout.startswith("partition 7: mmio_granularity is page: ")


@pytest.mark.parametrize("verb", [["show", "7"], ["set", "7", "--mmio-granularity", "vma"]], ids=" ".join)
def test_policy_json_has_the_fields_of_set_policy(socket_path: Path, verb: list[str]) -> None:
    answer = INSPECTION if verb[0] == "show" else None

    result, _ = run_against(socket_path, replies(answer), "policy", *verb, "--json")

    assert json.loads(result.stdout) == {"partition_id": 7, "mmio_granularity": "vma"}


def test_policy_show_explains_the_value(socket_path: Path) -> None:
    result, daemon = run_against(socket_path, replies(INSPECTION), "policy", "show", "7")

    assert daemon.methods == ["hello", "inspect_partition"]
    assert result.stdout == ("partition 7: mmio_granularity is vma: a first touch maps its whole VMA\n")


def test_drain_passes_its_timeout_in_milliseconds(socket_path: Path) -> None:
    result, daemon = run_against(
        socket_path, [*replies(None), HangUp()], "drain", "--timeout", "2.5", "--json"
    )

    assert daemon.heard[1:] == [("drain", [{"timeout_ms": 2500}])]
    assert json.loads(result.stdout) == {"timeout_ms": 2500}


RESTARTING: list[Step] = [*hello(), *replies(None)]


class Pauses:
    """In place of sleeping: counts, and runs something in one of them."""

    def __init__(self, number: int = 0, action: Callable[[], object] = int) -> None:
        self.count = 0
        self._number, self._action = number, action

    def sleep(self, _: float) -> None:
        self.count += 1
        if self.count == self._number:
            self._action()


def test_restart_waits_for_the_successor(socket_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    successor = ScriptedDaemon(socket_path, (hello(),))
    pauses = Pauses(3, successor.__enter__)
    monkeypatch.setattr(operator_client, "time", pauses)
    script = [*RESTARTING, Look(socket_path.unlink), HangUp()]
    try:
        with ScriptedDaemon(socket_path, (script,)) as daemon:
            result = run(socket_path, "restart")
    finally:
        successor.__exit__(None, None, None)

    assert (result.exit_code, result.stdout, result.stderr) == (0, "restarted\n", "")
    assert (daemon.heard[1:], successor.methods, pauses.count) == ([("restart", [{}])], ["hello"], 3)


def test_a_restart_without_a_successor_is_exit_code_3(
    socket_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pauses = Pauses()
    monkeypatch.setattr(operator_client, "time", pauses)
    with ScriptedDaemon(socket_path, ([*RESTARTING, Look(socket_path.unlink), HangUp()],)):
        result = run(socket_path, "restart")

    assert (result.exit_code, result.stdout, pauses.count) == (3, "", operator_client.SUCCESSOR_ATTEMPTS)
    assert "no such file" in result.stderr


def test_a_restart_that_is_refused_is_exit_code_1(socket_path: Path) -> None:
    refusal = WireError(errno.EINVAL, "a daemon started now could not go on: limits.vps: unknown key")
    result, _ = run_against(socket_path, [Hear(), Refuse(refusal)], "restart")

    assert (result.exit_code, result.stdout) == (1, "")
    assert "limits.vps: unknown key" in result.stderr


def test_a_drain_that_does_not_end_is_exit_code_3(socket_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("interceptctl.operator_client.ANSWER_TIMEOUT", 0.05)

    result, _ = run_against(socket_path, replies(None), "drain", "--timeout", "0")

    assert (result.exit_code, result.stdout) == (3, "")


def test_a_refusal_is_exit_code_1_and_the_daemons_words(socket_path: Path) -> None:
    refused: list[Step] = [Hear(), Refuse(WireError(errno.ENOENT, "no partition 9"))]

    result, _ = run_against(socket_path, refused, "show", "9")

    assert (result.exit_code, result.stdout) == (1, "")
    assert "ENOENT: no partition 9" in result.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ["policy", "set", "7"],
        ["policy", "set", "7", "--mmio-granularity", "region"],
        ["show", "guest"],
        ["show", "-1"],
        ["show", str(HUGE + 1)],
        ["drain"],
        ["drain", "--timeout", "-1"],
        ["drain", "--timeout", "5000000"],
    ],
    ids=" ".join,
)
def test_a_wrong_command_line_is_exit_code_2_before_anything_is_asked(
    socket_path: Path, arguments: list[str]
) -> None:
    assert run(socket_path, *arguments).exit_code == 2


@pytest.mark.parametrize(
    "arguments",
    [
        ["--socket", "", "ls"],
        ["exercise", "--vmm-socket", ""],
        ["guest", "--vmm-socket", ""],
        ["doctor", "--vmm-socket", ""],
    ],
    ids=" ".join,
)
def test_an_empty_path_is_exit_code_2_and_said_to_be_empty(arguments: list[str]) -> None:
    result = CliRunner().invoke(main, arguments)

    assert (result.exit_code, result.stdout) == (2, "")
    assert "an empty path names no socket" in result.stderr


def test_an_empty_variable_is_one_that_is_not_set(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As every shell has it; the default is said, and how to name another."""
    default = str(tmp_path / "absent.sock")
    monkeypatch.setattr(socket_option(), "default", default)
    result = CliRunner().invoke(main, ["ls"], env={"INTERCEPTCTL_SOCKET": ""})

    assert result.exit_code == 3
    assert f"Error: {default}: no such file" in result.stderr
    assert "--socket or INTERCEPTCTL_SOCKET names another" in result.stderr


def socket_option() -> click.Parameter:
    return next(option for option in main.params if option.name == "path")


def test_an_absent_socket_is_exit_code_3_and_named(socket_path: Path) -> None:
    result = run(socket_path, "ls")

    assert result.exit_code == 3
    assert f"Error: {socket_path}: no such file" in result.stderr


def test_a_socket_without_a_listener_is_named(socket_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(socket_path))

    result = run(socket_path, "ls")

    assert result.exit_code == 3
    assert f"{socket_path}: connection refused" in result.stderr


@pytest.fixture
def locked_path(socket_path: Path) -> Iterator[Path]:
    """A socket in a directory that this process may not enter while the fixture lives."""
    user = os.geteuid()
    socket_path.parent.chmod(0o000)
    os.seteuid(user or 65534)  # root may enter every directory, so become nobody
    yield socket_path
    os.seteuid(user)
    socket_path.parent.chmod(0o700)


def test_a_socket_without_permission_is_named(locked_path: Path) -> None:
    result = run(locked_path, "ls")

    assert result.exit_code == 3
    assert f"{locked_path}: permission denied" in result.stderr


def test_the_vmm_socket_is_reported_as_no_operator_socket(socket_path: Path) -> None:
    refused: list[Step] = [
        Hear(),
        Refuse(WireError(errno.EACCES, "operators are served elsewhere")),
        HangUp(),
    ]

    with ScriptedDaemon(socket_path, (refused,)):
        result = run(socket_path, "ls")

    assert result.exit_code == 3
    assert f"{socket_path}: not an operator socket, or access denied: EACCES: operators" in result.stderr


def test_a_server_of_another_protocol_is_reported_as_no_operator_socket(socket_path: Path) -> None:
    with ScriptedDaemon(socket_path, ([Say(b"220 mail\r\n")],)):
        result = run(socket_path, "ls")

    assert result.exit_code == 3
    assert f"{socket_path}: not an operator socket" in result.stderr


def test_a_server_that_hangs_up_at_once_is_reported_as_no_operator_socket(
    socket_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("intercept_client._connecting.RESTART_SECONDS", 0)
    with ScriptedDaemon(socket_path, ([Hear(), HangUp()],)):
        result = run(socket_path, "ls")

    assert result.exit_code == 3
    assert f"{socket_path}: not an operator socket: the connection ended" in result.stderr


def test_a_path_too_long_for_a_socket_is_named(tmp_path: Path) -> None:
    path = tmp_path / ("x" * 200)

    result = run(path, "ls")

    assert result.exit_code == 3
    assert f"{path}: the path has {len(str(path))} bytes, and that of a socket at most 107" in result.stderr


def test_another_protocol_version_is_reported_as_that(socket_path: Path) -> None:
    refusal = WireError(errno.EPROTONOSUPPORT, "hello: unsupported protocol 1 (supported: 2)")
    with ScriptedDaemon(socket_path, ([Hear(), Refuse(refusal)],)):
        result = run(socket_path, "ls")

    assert result.exit_code == 3
    assert f"{socket_path}: hello: unsupported protocol 1 (supported: 2)" in result.stderr


def test_a_connection_lost_in_between_is_exit_code_3(socket_path: Path) -> None:
    result, _ = run_against(socket_path, [Hear(), HangUp()], "stats")

    assert result.exit_code == 3
    assert f"{socket_path}: the connection ended" in result.stderr


def test_a_daemon_that_does_not_answer_is_exit_code_3(
    socket_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("interceptctl.operator_client.ANSWER_TIMEOUT", 0.05)

    result, _ = run_against(socket_path, [Hear()], "drain", "--timeout", "0")

    assert result.exit_code == 3
    assert "no answer within 0.05 s" in result.stderr


def test_the_socket_may_come_from_the_environment(socket_path: Path) -> None:
    with ScriptedDaemon(socket_path, ([*hello(), *replies(DAEMON)],)):
        result = CliRunner().invoke(main, ["stats"], env={"INTERCEPTCTL_SOCKET": str(socket_path)})

    assert result.exit_code == 0


def test_it_runs_as_a_module_and_documents_its_exit_codes() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "interceptctl", "--help"],
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, "NO_COLOR": "1"},
    )

    assert result.stdout.startswith("Usage: interceptctl ")
    assert "3  cannot reach the daemon" in result.stdout
    assert "/run/interceptd/operator.sock" in result.stdout


def leaves(group: click.Group, *above: str) -> Iterator[tuple[str, ...]]:
    """Every command by its words."""
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from leaves(command, *above, name)
        else:
            yield *above, name


COMMANDS = list(leaves(main))


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_every_command_has_json_and_its_help_fits_80_columns(words: tuple[str, ...]) -> None:
    result = CliRunner().invoke(main, [*words, "--help"], terminal_width=80)

    assert "--json" in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 80


def test_the_help_itself_fits_80_columns() -> None:
    result = CliRunner().invoke(main, ["--help"], terminal_width=80)

    assert max(map(len, result.stdout.splitlines())) <= 80


def test_the_version_is_the_daemons() -> None:
    result = CliRunner().invoke(main, ["--version"])

    assert result.stdout == f"interceptctl, version {interceptd.__version__}\n"


def test_exit_codes_of_the_help_are_those_of_the_documents() -> None:
    helped = re.findall(r"^    (\d)  ", CliRunner().invoke(main, ["--help"]).stdout, flags=re.MULTILINE)
    documented = re.findall(r"^\| (\d) \|", CLIENTS.read_text(encoding="utf-8"), flags=re.MULTILINE)

    assert helped == documented == ["0", "1", "2", "3", "4"]


@pytest.mark.parametrize(
    ("reply", "arguments"),
    [
        (DAEMON, ["stats"]),
        (INSPECTION, ["stats", "7"]),
        (DAEMON, ["health"]),
        (INSPECTION, ["policy", "show", "7"]),
        (None, ["policy", "set", "7", "--mmio-granularity", "vma"]),
        (None, ["drain", "--timeout", "1"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_a_command_prints_fits_80_columns(
    socket_path: Path, reply: object, arguments: list[str]
) -> None:
    result, _ = run_against(socket_path, [*replies(reply), HangUp()], *arguments)

    assert result.exit_code == 0
    assert max(map(len, result.stdout.splitlines())) <= 80


def fractions(command: click.Command, *names: str) -> Iterator[tuple[str, click.Option]]:
    """Every option that takes a number with a fraction."""
    for name, each in getattr(command, "commands", {}).items():
        yield from fractions(each, *names, name)
    for option in command.params:
        if isinstance(option, click.Option) and isinstance(option.type, click.types.FloatParamType):
            yield " ".join((*names, option.opts[0])), option


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_a_number_that_is_none_is_refused_by_every_option(value: str) -> None:
    found = dict(fractions(main))
    assert {"record --max-size", "replay --speed", "drain --timeout"} <= set(found)
    for option in found.values():
        with pytest.raises(click.BadParameter):
            option.type.convert(value, option, None)
