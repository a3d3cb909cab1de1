"""`interceptctl watch`: its subscription, its output, and how it ends."""

from __future__ import annotations

import errno
import json
import os
import pty
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from fakes.eventually import PATIENCE
from fakes.scripted_daemon import (
    Answer,
    Await,
    HangUp,
    Hear,
    Look,
    Refuse,
    Say,
    ScriptedDaemon,
    Signal,
    Step,
    hello,
)
from intercept_protocol import rpc
from intercept_protocol.errors import WireError
from intercept_protocol.events import (
    EVENT_METHOD,
    AnyFact,
    ConnectionRefused,
    DaemonRestarted,
    DrainStarted,
    Event,
    EventName,
    EventsDropped,
    HandoffRefused,
    HelloRefused,
    ImageFailed,
    InterceptAnswered,
    InvalidationBegun,
    PartitionCreated,
    PartitionEnded,
    PartitionLost,
    PartitionRecovered,
    PolicySet,
    RegionAdded,
    RegionRemoved,
    RestoreBegun,
    RestoreComplete,
    VpAttached,
    VpDetached,
)
from interceptctl.cli import main
from interceptctl.watch import command
from interceptctl.watch.line import line, particulars

AT = 1_764_000_000_123
ALL_BUT_INTERCEPTS = [name.value for name in EventName if name is not EventName.INTERCEPT_ANSWERED]
ATTACHED = Event(AT, VpAttached(vp_index=3), 7)


class Absence:
    """Time that a watch lets pass without a daemon. Unless a test says otherwise, Ctrl-C ends it at once."""

    def __init__(self) -> None:
        self.pauses: list[float] = []
        self.at_pause: Callable[[], None] = self.interrupt

    def sleep(self, seconds: float) -> None:
        self.pauses.append(seconds)
        self.at_pause()

    def time_ns(self) -> int:
        return AT * 1_000_000

    def interrupt(self, at: int = 0) -> None:
        """Ctrl-C in the pause of that number, or a later one."""
        if len(self.pauses) >= at:
            raise KeyboardInterrupt


@pytest.fixture(autouse=True)
def absence(monkeypatch: pytest.MonkeyPatch) -> Absence:
    fake = Absence()
    monkeypatch.setattr(command, "time", fake)
    monkeypatch.setattr(command, "_is_unread", lambda: False)
    return fake


def notification(event: Event) -> bytes:
    return rpc.encode_notification(EVENT_METHOD, [event.to_fields()])


def telling(*events: Event) -> list[Step]:
    """Takes a subscription, tells these events, and is gone."""
    return [*hello(), Hear(), Answer(), Say(b"".join(map(notification, events))), HangUp()]


def watch(path: Path, *arguments: str) -> Result:
    return CliRunner().invoke(main, ["--socket", str(path), "watch", *arguments])


def asked_for(path: Path, *arguments: str) -> object:
    """The fields of the subscription that these arguments make."""
    with ScriptedDaemon(path, (telling(),)) as daemon:
        watch(path, *arguments)
    ((method, (fields,)),) = daemon.heard[1:]
    assert method == "subscribe"
    return fields


@pytest.mark.parametrize(
    ("arguments", "fields"),
    [
        ([], {"events": ALL_BUT_INTERCEPTS}),
        (["--partition", "7"], {"events": ALL_BUT_INTERCEPTS, "partition_id": 7}),
        (
            ["--event", "vp_attached", "--event", "drain_started"],
            {"events": ["vp_attached", "drain_started"]},
        ),
        (["--vp", "3"], {"events": ["vp_attached", "vp_detached", "intercept_answered"], "vp_index": 3}),
        (["--reason", "kicked"], {"events": ["intercept_answered"], "reasons": ["kicked"]}),
        (
            ["--outcome", "fail", "--reason", "kicked", "--vp", "3"],
            {
                "events": ["intercept_answered"],
                "vp_index": 3,
                "reasons": ["kicked", "no_progress", "hypervisor_error"],
            },
        ),
        (
            ["--event", "intercept_answered", "--event", "vp_attached", "--reason", "kicked"],
            {"events": ["intercept_answered", "vp_attached"], "reasons": ["kicked"]},
        ),
    ],
    ids=repr,
)
def test_filters_are_the_daemons_to_apply(
    socket_path: Path, arguments: list[str], fields: dict[str, object]
) -> None:
    assert asked_for(socket_path, *arguments) == fields


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--event", "moon_rose"], "partition_created"),
        (["--reason", "bored"], "no_progress"),
        (["--outcome", "maybe"], "resume"),
        (["--event", "vp_attached", "--reason", "kicked"], "which --event does not include"),
    ],
    ids=repr,
)
def test_a_filter_that_matches_nothing_is_exit_code_2_and_lists_the_choices(
    socket_path: Path, arguments: list[str], said: str
) -> None:
    result = watch(socket_path, *arguments)

    assert result.exit_code == 2
    assert said in result.stderr


def test_each_event_is_a_line_and_the_daemons_end_is_waited_out_until_ctrl_c(socket_path: Path) -> None:
    gone = Event(AT + 1, PartitionEnded(intercepts=5), 7)
    with ScriptedDaemon(socket_path, (telling(ATTACHED, gone),)):
        result = watch(socket_path)

    assert (result.exit_code, result.stderr) == (0, "daemon went away, waiting\n")
    assert [text.split()[1:] for text in result.stdout.splitlines()] == [
        ["7", "vp_attached", "vp", "3"],
        ["7", "partition_ended", "5", "intercepts"],
    ]
    assert re.match(r"\d\d:\d\d:\d\d\.123 ", result.stdout)


RESTARTED = Event(AT, DaemonRestarted(partitions=2, connections=1))


def test_a_watch_goes_on_with_the_successor_and_says_where_events_may_be_missing(
    socket_path: Path, absence: Absence
) -> None:
    absence.at_pause = lambda: absence.interrupt(2)
    with ScriptedDaemon(socket_path, (telling(ATTACHED), telling(RESTARTED))) as daemon:
        result = watch(socket_path, "--partition", "7")

    assert (result.exit_code, result.stderr) == (0, "daemon went away, waiting\n" * 2)
    assert [text.split(maxsplit=3)[1:] for text in result.stdout.splitlines()] == [
        ["7", "vp_attached", "vp 3"],
        ["-", "reconnected", "events before this may be missing"],
        ["-", "daemon_restarted", "2 partitions, 1 connection"],
    ]
    (_, first), (_, second) = (asked for asked in daemon.heard if asked[0] == "subscribe")
    assert first == second == [{"events": ALL_BUT_INTERCEPTS, "partition_id": 7}]


def test_json_says_too_where_events_may_be_missing(socket_path: Path, absence: Absence) -> None:
    absence.at_pause = lambda: absence.interrupt(2)
    with ScriptedDaemon(socket_path, (telling(ATTACHED), telling(RESTARTED))):
        result = watch(socket_path, "--json")

    assert [json.loads(text) for text in result.stdout.splitlines()] == [
        ATTACHED.to_fields(),
        {"event": "reconnected", "time_ms": AT},
        RESTARTED.to_fields(),
    ]
    assert "reconnected" not in {*EventName}


def test_the_pauses_grow_and_are_bounded_and_the_absence_is_told_once(
    socket_path: Path, absence: Absence
) -> None:
    absence.at_pause = lambda: absence.interrupt(8)
    script: list[Step] = [*hello(), Hear(), Answer(), Look(socket_path.unlink), HangUp()]
    with ScriptedDaemon(socket_path, (script,)):
        result = watch(socket_path)

    assert absence.pauses == [0.1, 0.2, 0.4, 0.8, 1.6, 2.0, 2.0, 2.0]
    assert (result.exit_code, result.stderr) == (0, "daemon went away, waiting\n")


def test_the_first_daemon_is_not_waited_for(socket_path: Path, absence: Absence) -> None:
    result = watch(socket_path)

    assert (result.exit_code, absence.pauses) == (3, [])


LAST_WORDS = rpc.encode_error(0, WireError(errno.EPROTO, "that is enough"))


@pytest.mark.parametrize(
    ("words", "status"),
    [
        ([Hear(), Refuse(WireError(errno.EPROTONOSUPPORT, "not this version"))], 3),
        ([*hello(), Hear(), Refuse(WireError(errno.EINVAL, "no such event"))], 1),
        ([*hello(), Hear(), Answer(), Say(LAST_WORDS), HangUp()], 3),
    ],
    ids=["of the hello", "of the subscription", "under msgid 0"],
)
def test_a_refusal_by_the_successor_ends_the_watch(
    socket_path: Path, absence: Absence, words: list[Step], status: int
) -> None:
    absence.at_pause = lambda: absence.interrupt(2)
    with ScriptedDaemon(socket_path, (telling(), words)):
        result = watch(socket_path)

    assert (result.exit_code, absence.pauses) == (status, [0.1])


def test_a_reader_that_leaves_while_there_is_no_daemon_ends_the_watch(
    socket_path: Path, absence: Absence, monkeypatch: pytest.MonkeyPatch
) -> None:
    absence.at_pause = lambda: absence.interrupt(2)
    monkeypatch.setattr(command, "_is_unread", lambda: True)
    with ScriptedDaemon(socket_path, (telling(),)):
        result = watch(socket_path)

    assert (result.exit_code, absence.pauses) == (0, [0.1])


def test_json_is_the_wires_map_a_line(socket_path: Path) -> None:
    told = [ATTACHED, Event(AT, EventsDropped(count=9))]
    with ScriptedDaemon(socket_path, (telling(*told),)):
        result = watch(socket_path, "--json")

    assert [json.loads(text) for text in result.stdout.splitlines()] == [event.to_fields() for event in told]


def test_event_of_a_later_daemon_is_left_out(socket_path: Path) -> None:
    unknown = rpc.encode_notification(EVENT_METHOD, [{"event": "moon_rose", "time_ms": 1}])
    script: list[Step] = [*hello(), Hear(), Answer(), Say(unknown + notification(ATTACHED)), HangUp()]
    with ScriptedDaemon(socket_path, (script,)):
        result = watch(socket_path)

    assert len(result.stdout.splitlines()) == 1


def test_silence_is_waited_out(socket_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "LOOK_SECONDS", 0.02)
    looked = threading.Event()
    monkeypatch.setattr(command, "_is_unread", looked.set)
    script: list[Step] = [*hello(), Hear(), Answer(), Await(looked), Say(notification(ATTACHED)), HangUp()]
    with ScriptedDaemon(socket_path, (script,)):
        result = watch(socket_path)

    assert "vp_attached" in result.stdout


FACTS: list[AnyFact] = [
    PartitionCreated(name="guest-a", uid=64055, pid=1234567, address_space="declared", hypervisor="software"),
    PartitionEnded(intercepts=2**40),
    VpAttached(vp_index=255),
    VpDetached(vp_index=255, intercepts=2**40),
    RegionAdded(
        start_gfn=0x100000, page_count=0x40000, start_uaddr=0x7F0012345000, kind="movable",
        writable=True, executable=True,
    ),
    RegionRemoved(start_gfn=0x100000, page_count=0x40000, start_uaddr=0x7F0012345000),
    InvalidationBegun(source="userfaultfd", start_uaddr=0x7F0012345000, page_count=0x40000),
    InterceptAnswered(vp_index=255, outcome="fail", reason="hypervisor_error", gfn=0xFFFFFFF, access=4),
    InterceptAnswered(vp_index=255, outcome="forward", reason="not_memory"),
    PolicySet(mmio_granularity="page"),
    RestoreBegun(name="guest-a", uid=64055, image_pages=2**20, timeout_ms=3_600_000),
    RestoreComplete(pages_in=2**20),
    PartitionRecovered(regions=10**6, mappings=10**6, connections=321),
    DaemonRestarted(partitions=64, connections=8192),
    DrainStarted(timeout_ms=2**32 - 1, partitions=64),
    EventsDropped(count=2**40),
]  # fmt: skip


@pytest.mark.parametrize("fact", FACTS, ids=lambda fact: fact.event_name)
def test_line_fits_80_columns_and_one_with_regions_a_hundred(fact: AnyFact) -> None:
    columns = 100 if isinstance(fact, RegionAdded | RegionRemoved | PartitionRecovered) else 80
    assert len(line(Event(AT, fact, 123))) <= columns


@pytest.mark.parametrize(
    ("fact", "said"),
    [
        (
            RegionAdded(
                start_gfn=0x100000, page_count=0x40000, start_uaddr=0x7F0012345000, kind="movable",
                writable=True, executable=False,
            ),
            "0x100000000-0x140000000 at 0x7f0012345000 movable rw-",
        ),
        (
            RegionRemoved(start_gfn=0xFEB00, page_count=16, start_uaddr=0x7F0012345000),
            "0xfeb00000-0xfeb10000 at 0x7f0012345000",
        ),
        (
            InvalidationBegun(source="notifier", start_uaddr=0x7F0012345000, page_count=2),
            "0x7f0012345000-0x7f0012347000 notifier",
        ),
        (
            InterceptAnswered(vp_index=3, outcome="resume", reason="mapped", gfn=0xFEB03, access=2),
            "vp 3 w 0xfeb03000 resume mapped",
        ),
        (PartitionEnded(intercepts=1), "1 intercept"),
        (DrainStarted(timeout_ms=5000, partitions=1), "1 partition, 5,000 ms"),
        (PartitionRecovered(regions=1, mappings=2, connections=3), "1 region, 2 mappings, 3 connections"),
        (EventsDropped(count=12345), "12,345 events dropped"),
        (PartitionCreated(name="a", uid=1, pid=0, address_space="process", hypervisor="vmm"),
         "pid - process vmm a"),
        (ConnectionRefused(error="EACCES", uid=5, pid=0), "uid 5 pid - EACCES"),
    ],
    ids=lambda value: getattr(value, "event_name", ""),
)  # fmt: skip
def test_addresses_are_bytes_ranges_are_half_open_and_one_is_singular(fact: AnyFact, said: str) -> None:
    assert particulars(fact) == said


@pytest.mark.parametrize(
    "fact",
    [
        PartitionCreated(name="\x1b[2J", uid=0, pid=1, address_space="process", hypervisor="vmm"),
        PartitionLost(error="\x1b[2J"),
        ImageFailed(error="\x1b[2J"),
        HandoffRefused(error="\x1b[2J", uid=0, pid=1),
        HelloRefused(error="\x1b[2J", uid=0, pid=1),
        ConnectionRefused(error="\x1b[2J", uid=0, pid=1),
    ],
    ids=lambda fact: fact.event_name,
)
def test_foreign_words_cannot_steer_the_terminal(fact: AnyFact) -> None:
    text = line(Event(AT, fact))

    assert "\x1b" not in text
    assert r"\x1b[2J" in text


# ---------------------------------------------------------------- as a process


@contextmanager
def watching(path: Path, stdout: int) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(
        [sys.executable, "-m", "interceptctl", "--socket", str(path), "watch"],
        stdin=subprocess.DEVNULL,
        stdout=stdout,
        stderr=subprocess.PIPE,
        env={**os.environ, "COLUMNS": "80"},
    )
    with process:
        try:
            yield process
        finally:
            process.kill()


def test_ctrl_c_ends_it_with_exit_code_0_and_without_a_word(socket_path: Path) -> None:
    done = threading.Event()
    script: list[Step] = [*hello(), Hear(), Answer(), Say(notification(ATTACHED)), Await(done)]
    with ScriptedDaemon(socket_path, (script,)), watching(socket_path, subprocess.PIPE) as process:
        assert process.stdout is not None
        assert b"vp_attached" in process.stdout.readline()

        process.send_signal(signal.SIGINT)

        _, complaint = process.communicate(timeout=PATIENCE)
        done.set()
    assert (process.returncode, complaint) == (0, b"")


@pytest.mark.parametrize("further", [b"", notification(ATTACHED)], ids=["in silence", "at an event"])
def test_a_reader_that_is_gone_ends_it_with_exit_code_0_and_without_a_word(
    socket_path: Path, further: bytes
) -> None:
    closed, done = threading.Event(), threading.Event()
    begin: list[Step] = [*hello(), Hear(), Answer(), Say(notification(ATTACHED))]
    script: list[Step] = [*begin, Await(closed), Say(further), Await(done)]
    with ScriptedDaemon(socket_path, (script,)), watching(socket_path, subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()

        process.stdout.close()
        closed.set()

        assert process.stderr is not None
        complaint = process.stderr.read()
        status = process.wait(PATIENCE)
        done.set()
    assert (status, complaint) == (0, b"")


def test_output_that_finds_no_space_ends_it_with_one_sentence(socket_path: Path) -> None:
    done = threading.Event()
    script: list[Step] = [*hello(), Hear(), Answer(), Say(notification(ATTACHED)), Await(done)]
    full = os.open("/dev/full", os.O_WRONLY)
    with ScriptedDaemon(socket_path, (script,)), watching(socket_path, full) as process:
        os.close(full)
        assert process.stderr is not None
        complaint = process.stderr.read()
        status = process.wait(PATIENCE)
        done.set()
    assert (status, complaint) == (1, b"Error: standard output: No space left on device\n")


def test_a_line_longer_than_the_terminal_is_cut_to_it(socket_path: Path) -> None:
    told, done = threading.Event(), threading.Event()
    lost = Event(AT, PartitionLost(error="x" * 200), 7)
    script: list[Step] = [*hello(), Hear(), Answer(), Say(notification(lost)), Signal(told), Await(done)]
    ours, theirs = pty.openpty()
    with ScriptedDaemon(socket_path, (script,)), watching(socket_path, theirs) as process:
        os.close(theirs)
        with os.fdopen(ours, "rb") as terminal:
            shown = terminal.readline().rstrip().decode()
            process.send_signal(signal.SIGINT)
            process.wait(PATIENCE)
        done.set()

    assert len(shown) == 80
    assert shown.endswith("xxx…")
