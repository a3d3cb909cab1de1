"""A uid's share of the log: what its clients cause is bounded in bytes, and counted if it is not written."""

from __future__ import annotations

import ast
import json
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import pytest
import structlog
import trio
import trio.testing
from structlog.testing import CapturingLogger, capture_logs
from structlog.typing import FilteringBoundLogger

import interceptd
from fakes.served import serving
from interceptd.config.schema import Log, Metrics
from interceptd.connections.listen_address import ListenAddress
from interceptd.log_share import (
    BURST_SECONDS,
    BYTES_PER_SECOND,
    TEXT_LENGTH,
    LogShare,
    Severity,
    charge_lines_to,
    current_share,
)
from interceptd.logs.configure import processors

BURST = int(BURST_SECONDS * BYTES_PER_SECOND)
LONGEST = 1024
"""Bytes of a line here."""


class Told:
    """The lines of the running task, which works for a uid; `clock` is the uid's, in seconds."""

    def __init__(self, log_format: Literal["json", "console"] = "json", uid: int | None = 1000) -> None:
        self.clock = 0.0
        self.share = LogShare(uid, lambda: self.clock)
        charge_lines_to(self.share)
        self._written = CapturingLogger()
        self.log: FilteringBoundLogger = structlog.wrap_logger(
            self._written,
            processors=processors(Log(format=log_format)),
            wrapper_class=structlog.make_filtering_bound_logger(0),
        )

    @property
    def lines(self) -> list[str]:
        return [call.args[0] for call in self._written.calls]

    @property
    def events(self) -> list[dict[str, object]]:
        return [json.loads(line) for line in self.lines]

    @property
    def size(self) -> int:
        return sum(len(line) for line in self.lines)


# ------------------------------------------------ how much


async def test_a_burst_is_written_at_once_and_then_as_many_bytes_as_the_rate_allows() -> None:
    told = Told()
    for _ in range(1000):
        told.log.info("policy_set", partition_id=1)
    assert BURST <= told.size <= BURST + LONGEST
    for told.clock in range(1, 61):
        for _ in range(100):
            told.log.info("policy_set", partition_id=1)
    assert BURST + 59 * BYTES_PER_SECOND <= told.size <= BURST + 60 * BYTES_PER_SECOND + LONGEST


async def test_the_next_line_says_how_many_were_not_written_and_none_is_lost() -> None:
    told, asked = Told(), 2000
    for number in range(asked):
        told.clock = number / 10
        for _ in range(10):
            told.log.info("policy_set")
    told.clock += 1
    told.log.info("partition_ended")
    not_logged = sum(int(str(event.get("not_logged", 0))) for event in told.events)
    assert len(told.events) + not_logged == 10 * asked + 1
    assert ("not_logged" in told.events[0], told.share.take_not_logged()) == (False, 0)


async def test_a_long_line_is_paid_for_by_those_that_follow() -> None:
    told = Told()
    told.log.info("map_refused", listed=["x" * TEXT_LENGTH] * 1000)
    told.clock = told.size / BYTES_PER_SECOND - BURST_SECONDS - 1
    told.log.info("map_refused")
    told.clock += 2
    told.log.info("map_refused")
    assert [event.get("not_logged") for event in told.events] == [None, 1]


@pytest.mark.parametrize(
    ("flood", "level"),
    [("info", "warning"), *(("warning", level) for level in ("error", "critical", "exception"))],
)
async def test_lines_do_not_drown_more_severe_ones_which_have_an_account_of_their_own(
    flood: str, level: str
) -> None:
    told = Told()
    for _ in range(1000):
        getattr(told.log, flood)("less_severe")
    before = told.size
    for _ in range(1000):
        getattr(told.log, level)("more_severe")
    first = next(event for event in told.events if event["event"] == "more_severe")
    assert first["not_logged"] == 1000 - len([line for line in told.lines if "less_severe" in line])
    assert BURST <= told.size - before <= BURST + LONGEST


async def test_uids_have_shares_of_their_own() -> None:
    one = Told()
    for _ in range(1000):
        one.log.info("policy_set")
    other = Told(uid=1001)
    other.log.info("policy_set")
    assert [event["uid"] for event in (one.events[0], other.events[0])] == [1000, 1001]


async def test_a_task_without_a_share_writes_every_line() -> None:
    told = Told()
    charge_lines_to(None)
    for _ in range(1000):
        told.log.info("policy_set", text="x" * 1000)
    assert (len(told.lines), told.share.idle) == (1000, True)
    assert [event for event in told.events if "uid" in event or event["text"] != "x" * 1000] == []


# ------------------------------------------------ what


def fail(text: str) -> None:
    """With an error that quotes `text`, and so does its cause."""
    try:
        float(text)
    except ValueError as error:
        raise RuntimeError(text) from error


@pytest.mark.parametrize("log_format", ["json", "console"])
async def test_a_text_of_a_client_is_cut_wherever_it_stands(log_format: Literal["json", "console"]) -> None:
    told, text = Told(log_format), "A" * 60_000
    told.log.warning("map_refused", error=text, listed=[text], mapped={"key": text})
    with pytest.raises(RuntimeError) as failed:
        fail(text)
    told.log.error("connection_failed", exc_info=failed.value)
    assert [len(line) < 2000 + 4 * TEXT_LENGTH for line in told.lines] == [True, True]
    assert [line.count("A" * (TEXT_LENGTH - 60)) for line in told.lines] == [3, 2]


async def test_a_text_of_the_greatest_length_is_whole() -> None:
    told = Told()
    told.log.warning("map_refused", error="A" * TEXT_LENGTH)
    assert told.events[0]["error"] == "A" * TEXT_LENGTH


# ------------------------------------------------ whose


PACKAGE = Path(interceptd.__file__).parent
OWN_TASKS = {
    "connections.accept.accept_forever", "connections.hangup_watch.HangupWatch.run",
    "recovery.compactor.Compactor.run", "scheduling.time_share.TimeShares.run",
    "sessions.restores.Restores.run",
}  # fmt: skip
SCRAPERS_TASKS = {"LoopLag.run", "metrics.endpoint.MetricsEndpoint.run"}
OPERATORS_TASKS = {"Dispatcher.serve", "EventStream.run"}
CLIENTS_TASKS = {
    "Dispatcher.serve",
    "Partition._end_with_memory",
    "Partition._spawn.<locals>.live",
    "Partition._telling_vps",
    "ProcessAddressSpace._watch_attached",
    "ProcessAddressSpace._watch_exit",
}


def tasks_below(task: trio.lowlevel.Task) -> Iterator[trio.lowlevel.Task]:
    for nursery in task.child_nurseries:
        for child in nursery.child_tasks:
            yield child
            yield from tasks_below(child)


async def test_every_task_that_serves_a_client_has_the_share_of_its_uid_and_no_other_task_has() -> None:
    """With a connection of each role, one without hello, and the metrics' listener."""
    whose: defaultdict[object, Counter[str]] = defaultdict(Counter)
    async with serving(metrics=Metrics(listen=ListenAddress("127.0.0.1:0"))) as served:
        guest = await served.guest()
        await served.vp(guest)
        await served.notifier(guest)
        await served.operator()
        await served.connect()
        vmm = await served.hello("vmm")
        created = await vmm.ask("create_partition", address_space="process", hypervisor="vmm")
        assert isinstance(created, dict)
        await served.hello("hypervisor", partition_id=created["partition_id"], token=created["token"])
        await trio.testing.wait_all_tasks_blocked()
        for task in tasks_below(trio.lowlevel.current_task()):
            code = task.coro.cr_code
            if PACKAGE in Path(code.co_filename).parents:
                share = task.context.run(current_share)
                vital = code.co_qualname == "vital"
                name = task.name.removeprefix("interceptd.") if vital else code.co_qualname
                whose["nobody" if share is None else share.uid][name] += 1
    assert {who: set(tasks) for who, tasks in whose.items()} == {
        "nobody": OWN_TASKS | OPERATORS_TASKS, os.getuid(): CLIENTS_TASKS, None: SCRAPERS_TASKS
    }  # fmt: skip
    assert (whose["nobody"]["Dispatcher.serve"], whose[os.getuid()]["Dispatcher.serve"]) == (1, 3)


async def test_the_lines_of_an_operators_requests_are_always_written() -> None:
    async with serving() as served:
        guest, operator = await served.guest(), await served.operator()
        spent = served.daemon.dispatcher.admission.tenants.of(os.getuid()).log_share
        spent.charge(Severity.ORDINARY, 1 << 40)
        with capture_logs(processors(Log())[:1]) as lines:
            await guest.vmm.ask("set_policy", mmio_granularity="page")
            await operator.ask("set_policy", partition_id=guest.partition_id, mmio_granularity="vma")
        assert [line["mmio_granularity"] for line in lines] == ["vma"]


async def test_the_daemons_last_line_but_one_says_what_was_not_logged() -> None:
    async with serving() as served:
        share = served.daemon.dispatcher.admission.tenants.of(os.getuid()).log_share
        share.charge(Severity.ORDINARY, 1 << 40)
        with capture_logs(processors(Log())[:1]) as lines:
            await served.guest()
            served.daemon.drain()
            await served.ended.wait()
    told = [(line["event"], line.get("not_logged")) for line in lines if line["event"] != "long_step"]
    assert told == [("drain_started", None), ("lines_not_logged", 2), ("daemon_ended", None)]


OWN_LINES = {
    "configuration_not_reloaded", "configuration_reloaded", "connection_not_accepted", "daemon_ended",
    "daemon_ended_at_once", "daemon_restarted", "daemon_rests", "daemon_started", "descriptors_run_out",
    "drain_cut_short",
    "drain_started", "lines_not_logged", "long_step", "metrics_served", "nobody_may_connect", "nothing_kept",
    "partition_not_continued", "partition_not_recovered", "passed_descriptor_not_used",
    "service_manager_not_told", "vital_task_failed",
}  # fmt: skip
"""Of the daemon's own tasks, and `drain_started` of an operator's. What clients could cause has a pace:
`Shortage` and the step monitor wait between two lines, and a uid is forgotten, with its
`lines_not_logged`, only when its share is whole again."""
CLIENTS_LINES = {
    "connection_failed", "connection_gone", "connection_refused", "descriptors_not_stored",
    "fault_outside_regions", "faults_unbacked", "faults_undecided",
    "guest_killed", "guest_left_frozen", "handoff_refused", "hello_refused", "image_failed",
    "map_broke_down", "map_refused", "mappings_left", "memory_gone", "memory_not_watched", "metrics_failed",
    "partition_created",
    "partition_end_cut_short", "partition_ended", "partition_lost", "partition_not_kept",
    "partition_recovered",
    "pinned_region_dangling", "policy_set", "request_refused", "request_suspected",
    "restore_begun", "removals_held_up", "restore_complete", "restore_failed", "restore_not_claimed",
    "unregister_refused", "userfaultfd_unreadable",
}  # fmt: skip
"""Of tasks that have a share."""


LINE = r"log\.(debug|info|warning|error|exception|critical|log)"


def logged(module: ast.Module) -> set[str]:
    """The events of a module's log lines; a line that is written in another way stands as its source."""
    calls = [node for node in ast.walk(module) if isinstance(node, ast.Call)]
    lines = [call for call in calls if re.fullmatch(LINE, ast.unparse(call.func))]
    return {
        str(call.args[0].value) if call.args and isinstance(call.args[0], ast.Constant) else ast.unparse(call)
        for call in lines
    }


def test_every_log_line_is_the_daemons_own_or_takes_its_place_in_a_share() -> None:
    """And no module writes both."""
    own, clients, others = set(), set(), []
    for path in PACKAGE.rglob("*.py"):
        module = ast.parse(path.read_text())
        events = logged(module)
        own |= events if events <= OWN_LINES else set()
        clients |= events if events <= CLIENTS_LINES else set()
        if not (events <= OWN_LINES or events <= CLIENTS_LINES):
            others.append((path.name, events))
    assert others == []
    assert (own, clients) == (OWN_LINES, CLIENTS_LINES)
