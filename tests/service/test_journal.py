"""The log in the systemd journal: entries by its native protocol, on a socket that may be full or gone."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import structlog

from fakes.journal import FakeJournal, fake_journal, parse
from interceptd.config.schema import Log
from interceptd.keeper.log import log as keeper_log
from interceptd.log_share import LogShare, Severity, charge_lines_to
from interceptd.logs import configure
from interceptd.logs.configure import configure_logs, format_of, processors
from interceptd.logs.output import JournalLogger, StderrLogger
from interceptd.systemd.journald import MOST_BYTES, Journal, encode, field_name, is_journal

HOSTILE = "x\nPRIORITY=0\nMESSAGE=forged\x1b[2J\udcff"
ESCAPED = "x\\nPRIORITY=0\\nMESSAGE=forged\\x1b[2J\\udcff"


def fail(error: Exception) -> None:
    raise error


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[FakeJournal]:
    with fake_journal(tmp_path / "journal") as fake:
        yield fake


@pytest.fixture
def output(tmp_path: Path) -> Iterator[JournalLogger]:
    """Sends to the journal of the test's directory, whether there is one or not."""
    sending = Journal(str(tmp_path / "journal"))
    StderrLogger._dropped = 0
    yield JournalLogger(sending)
    StderrLogger._dropped = 0
    sending.close()


@pytest.fixture
def log(output: JournalLogger) -> Any:
    return structlog.wrap_logger(
        output,
        processors=processors(Log(format="journal")),
        wrapper_class=structlog.make_filtering_bound_logger(logging.DEBUG),
    )


def test_an_entry_has_its_fields_one_a_line() -> None:
    assert encode({"PRIORITY": "6", "MESSAGE": "a=b c"}) == b"PRIORITY=6\nMESSAGE=a=b c\n"


def test_a_value_with_a_newline_is_sent_with_its_length() -> None:
    assert encode({"A": "one\ntwo", "B": ""}) == b"A\n\x07\0\0\0\0\0\0\0one\ntwo\nB=\n"


def test_a_value_that_is_too_long_is_cut_between_two_characters() -> None:
    (value,) = parse(encode({"A": "x" + "é" * MOST_BYTES})).values()
    assert value == "x" + "é" * ((MOST_BYTES - 1) // 2)


def test_a_fields_name_has_only_characters_that_the_journal_takes() -> None:
    assert field_name("interceptd_", "vp_index") == "INTERCEPTD_VP_INDEX"
    assert field_name("interceptd_", "a-b\nc=ä") == "INTERCEPTD_A_B_C__"
    assert len(field_name("interceptd_", "x" * 100)) == 64


def test_a_line_is_an_entry_with_a_priority_a_message_and_a_field_for_each_fact(
    journal: FakeJournal, log: Any
) -> None:
    log.warning("hello_refused", uid=1000, error="EACCES: no such partition", kept=False, ranges=[1, "b"])
    assert journal.take() == (
        b"PRIORITY=4\n"
        b"SYSLOG_IDENTIFIER=interceptd\n"
        b'MESSAGE=hello_refused uid=1000 error="EACCES: no such partition" kept=false ranges="[1, \\"b\\"]"\n'
        b"INTERCEPTD_UID=1000\n"
        b"INTERCEPTD_ERROR=EACCES: no such partition\n"
        b"INTERCEPTD_KEPT=false\n"
        b'INTERCEPTD_RANGES=[1, "b"]\n'
        b"INTERCEPTD_EVENT=hello_refused\n"
    )


@pytest.mark.parametrize(
    ("method", "priority"),
    [("debug", "7"), ("info", "6"), ("warning", "4"), ("error", "3"), ("critical", "2")],
)
def test_a_priority_is_that_of_syslog(journal: FakeJournal, log: Any, method: str, priority: str) -> None:
    getattr(log, method)("happened")
    assert journal.entry()["PRIORITY"] == priority


def test_hostile_text_adds_no_field_and_steers_no_terminal(journal: FakeJournal, log: Any) -> None:
    log.info("partition_created", name=HOSTILE, nested={"a": [HOSTILE]})
    entry = journal.entry()
    assert (entry["PRIORITY"], entry["INTERCEPTD_NAME"]) == ("6", ESCAPED)
    assert entry.keys() == {
        *("PRIORITY", "SYSLOG_IDENTIFIER", "MESSAGE"),
        *("INTERCEPTD_EVENT", "INTERCEPTD_NAME", "INTERCEPTD_NESTED"),
    }
    assert all(value.isprintable() for value in entry.values())


def test_a_traceback_is_text_of_several_lines(journal: FakeJournal, log: Any) -> None:
    try:
        fail(RuntimeError("the cause\x1b"))
    except RuntimeError:
        log.exception("connection_failed")
    entry = journal.entry()
    first, *lines = entry["MESSAGE"].split("\n")
    assert (entry["PRIORITY"], first) == ("3", "connection_failed")
    assert lines == entry["INTERCEPTD_EXCEPTION"].split("\n")
    assert (lines[0], lines[-1]) == ("Traceback (most recent call last):", "RuntimeError: the cause\\x1b")


def test_a_line_of_a_library_is_an_entry_with_its_priority(
    journal: FakeJournal, output: JournalLogger, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(configure, "_journal", lambda: output)
    root = logging.getLogger()
    before = root.handlers[:], root.level
    try:
        configure_logs(Log(format="journal"))
        try:
            fail(OSError(24, "too many"))
        except OSError:
            logging.getLogger("trio").error("accept %s", HOSTILE, exc_info=True)
    finally:
        structlog.reset_defaults()
        root.handlers[:], root.level = before
    entry = journal.entry()
    first, *lines = entry["MESSAGE"].split("\n")
    assert (entry["PRIORITY"], first) == ("3", f"accept {ESCAPED}")
    assert lines[-1] == "OSError: [Errno 24] too many"


# ------------------------------------------------ a journal that is full, or gone


def test_an_entry_for_which_there_is_no_room_is_dropped_and_counted(journal: FakeJournal, log: Any) -> None:
    room = int(Path("/proc/sys/net/unix/max_dgram_qlen").read_text()) + 1
    for number in range(room + 3):
        log.info("happened", number=number)
    kept = [journal.entry() for _ in range(room)]
    assert [entry["INTERCEPTD_NUMBER"] for entry in kept] == [str(number) for number in range(room)]
    log.info("happened")
    log.info("happened")
    assert [journal.entry().get("INTERCEPTD_LINES_DROPPED") for _ in range(2)] == ["3", None]


def test_without_a_journal_lines_go_to_standard_error_with_their_priority(
    log: Any, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    try:
        fail(RuntimeError("the cause"))
    except RuntimeError:
        log.exception("connection_failed", name=HOSTILE)
    (line,) = capfd.readouterr().err.splitlines()
    start, end = f'<3>connection_failed name="{ESCAPED}"\\nTraceback', "\\nRuntimeError: the cause"
    assert (line.startswith(start), line.endswith(end)) == (True, True)
    with fake_journal(tmp_path / "journal") as journal:
        log.info("happened")
        assert journal.entry()["MESSAGE"] == "happened"


def test_an_entry_is_charged_to_the_uid_that_caused_it(journal: FakeJournal, log: Any) -> None:
    share = LogShare(uid=7, clock=lambda: 0.0)
    charge_lines_to(share)
    try:
        log.info("hello_refused")
    finally:
        charge_lines_to(None)
    entry = journal.take()
    spent = LogShare(clock=lambda: 0.0)
    spent.charge(Severity.ORDINARY, len(entry))
    assert (parse(entry)["INTERCEPTD_UID"], share._paid_until) == ("7", spent._paid_until)


# ------------------------------------------------ whether standard error is the journal


def stream(descriptor: int) -> str:
    status = os.fstat(descriptor)
    return f"{status.st_dev}:{status.st_ino}"


def test_the_journal_is_recognised_by_device_and_inode() -> None:
    ours, theirs = os.pipe()
    try:
        assert is_journal({"JOURNAL_STREAM": stream(ours)}, ours)
        assert not is_journal({"JOURNAL_STREAM": f"{stream(ours)}0"}, ours)
        assert not is_journal({}, ours)
    finally:
        os.close(ours)
        os.close(theirs)
    assert not is_journal({"JOURNAL_STREAM": "1:1"}, -1)


def test_a_format_that_is_stated_is_taken_whatever_standard_error_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JOURNAL_STREAM", stream(sys.stderr.fileno()))
    assert [format_of(Log(format=name)) for name in ("auto", "json", "console", "journal")] == [
        *("journal", "json", "console", "journal")
    ]


def test_a_keeper_writes_the_priority_in_front_of_a_line_in_the_journal(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JOURNAL_STREAM", stream(sys.stderr.fileno()))
    keeper_log("warning", "daemon_died")
    monkeypatch.setenv("JOURNAL_STREAM", "1:1")
    keeper_log("warning", "daemon_died")
    in_journal, elsewhere = capfd.readouterr().err.splitlines()
    assert (in_journal[:4], elsewhere[0]) == ("<4>{", "{")
    assert {json.loads(line)["event"] for line in (in_journal[3:], elsewhere)} == {"daemon_died"}
