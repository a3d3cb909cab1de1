"""`interceptctl vmms`: partitions added up by process, and who is first."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Final

import msgspec
import pytest
from click.testing import CliRunner, Result

from fakes.scripted_daemon import ScriptedDaemon, hello, replies
from intercept_protocol.messages import PartitionList, PartitionSummary
from interceptctl.cli import main


def summary(partition_id: int, pid: int, name: str = "guest", **figures: int) -> PartitionSummary:
    usual = PartitionSummary(
        partition_id=partition_id, name=name, uid=107, pid=pid, address_space="declared",
        hypervisor="software", vps=2, regions=20, mapped_gfns=0, intercepts=0, invalidations=0, age_ms=1,
    )  # fmt: skip
    return msgspec.structs.replace(usual, **figures)


SUMMARIES: Final = [
    summary(1, 500, "web", open_invalidations=1, oldest_invalidation_ms=3),
    summary(2, 400, "leak"),
    summary(3, 600, "stuck", open_invalidations=2, oldest_invalidation_ms=83_000, waiting_vps=2),
    summary(4, 400, regions=1, memory_bytes=512 << 20),
    summary(5, 0, "boxed", regions=70_000),
    summary(6, 0, "boxed too", vps=64),
]
FIRST: Final = {"open": 600, "wait": 600, "memory": 400, "regions": 0, "vps": 0, "partitions": 400}


def run(path: Path, *arguments: str, summaries: list[PartitionSummary] = SUMMARIES) -> Result:
    page = PartitionList(partitions=summaries, more=False)
    with ScriptedDaemon(path, ([*hello(), *replies(page)],)):
        return CliRunner().invoke(main, ["--socket", str(path), "vmms", *arguments])


def test_the_partitions_of_a_process_are_one_line_and_those_of_unseen_processes_one_each(
    socket_path: Path,
) -> None:
    heading, *lines = run(socket_path, "--sort", "partitions").stdout.splitlines()
    assert " ".join(heading.split()) == "UID PID ID NAME PARTITIONS VPS WAIT REGIONS MEMORY OPEN SINCE"
    assert [line.split() for line in lines] == [
        ["107", "400", "2", "leak", "2", "4", "0", "21", "512", "MiB", "0"],
        ["107", "600", "3", "stuck", "1", "2", "2", "20", "0", "KiB", "2", "1m23s"],
        ["107", "500", "1", "web", "1", "2", "0", "20", "0", "KiB", "1", "0s"],
        ["107", "-", "5", "boxed", "1", "2", "0", "70000", "0", "KiB", "0"],
        ["107", "-", "6", "boxed", "too", "1", "64", "0", "20", "0", "KiB", "0"],
        [],
        ["pid", "-:", "the", "process", "is", "in", "another", "pid", "namespace"],
    ]
    assert max(map(len, [heading, *lines])) <= 80


@pytest.mark.parametrize(("order", "pid"), FIRST.items())
def test_the_first_line_has_most_of_what_is_asked_for(socket_path: Path, order: str, pid: int) -> None:
    first, *others = json.loads(run(socket_path, "--sort", order, "--json").stdout)["vmms"]
    assert first["pid"] == pid
    assert len(others) == 4


def test_without_partitions_it_says_so(socket_path: Path) -> None:
    assert run(socket_path, summaries=[]).stdout == "no partitions\n"
