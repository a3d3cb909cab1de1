"""The ledger's layout: what a successor finds of what was written, and what it refuses to read."""

from __future__ import annotations

import os
import socket
import sys
import tempfile

import pytest

from interceptd.ledger import ledger as layout
from interceptd.ledger.ledger import HALF, SIZE, Ledger, LedgerFull, LedgerUnreadable

from .conftest import found

LOG = SIZE - 2 * HALF


def records(ledger: Ledger) -> list[bytes]:
    return [record for record, _ in ledger.frames()]


def written(ledger: Ledger, at: int, data: bytes) -> None:
    os.pwrite(ledger.descriptor, data, at)


def word(number: int, size: int) -> bytes:
    return number.to_bytes(size, sys.byteorder)


def blocks(ledger: Ledger) -> int:
    return os.fstat(ledger.descriptor).st_blocks


def rewritten(ledger: Ledger, *log: bytes) -> None:
    rewriting = ledger.rewrite()
    for record in log:
        rewriting.append(record)
    rewriting.commit()


@pytest.fixture
def small_halves(monkeypatch: pytest.MonkeyPatch) -> int:
    """A half that a test can fill; the size of the file is what two of them would make it."""
    half = 1 << 16
    monkeypatch.setattr(layout, "HALF", half)
    monkeypatch.setattr(layout, "_PIECE", half)
    monkeypatch.setattr(layout, "SIZE", LOG + 2 * half)
    return half


def test_a_successor_finds_what_was_appended(ledger: Ledger) -> None:
    ledger.append(b"first")
    ledger.append(b"")
    ledger.append(b"x" * 100_000)
    assert records(found(ledger)) == records(ledger) == [b"first", b"", b"x" * 100_000]


def test_a_new_ledger_has_no_records_and_no_past(ledger: Ledger) -> None:
    ledger = found(ledger)
    assert (records(ledger), ledger.restarts, ledger.last_msgid, bytes(ledger.event)) == ([], 0, 0, bytes(32))


def test_a_frame_that_the_commit_word_does_not_cover_does_not_exist(ledger: Ledger) -> None:
    ledger.append(b"whole")
    ledger._write(ledger._end, b"written, and then killed", ledger._limit)
    successor = found(ledger)
    assert records(successor) == [b"whole"]
    successor.append(b"next")
    assert records(successor) == [b"whole", b"next"]


def test_reading_goes_on_to_what_is_appended_meanwhile(ledger: Ledger) -> None:
    ledger.append(b"1")
    read = []
    for record, place in ledger.frames():  # noqa: B007 - the last one is used below
        read.append(record)
        if len(read) < 4:
            ledger.append(b"%d" % (len(read) + 1))
    assert read == [b"1", b"2", b"3", b"4"]
    assert list(ledger.frames(place)) == []


def test_the_words_of_the_header_are_a_successors_too(ledger: Ledger) -> None:
    ledger.last_msgid = 0xFFFF_FFFE
    ledger.event[:] = bytes(range(32))
    ledger.count_restart()
    ledger.append(b"a record")
    successor = found(ledger)
    successor.count_restart()
    assert (successor.last_msgid, successor.restarts) == (0xFFFF_FFFE, 2)
    assert bytes(successor.event) == bytes(range(32))
    assert records(successor) == [b"a record"]


# ------------------------------------------------ two halves


def test_a_log_is_rewritten_from_half_to_half(ledger: Ledger) -> None:
    for turn in range(4):
        ledger.append(b"old")
        rewritten(ledger, b"short", b"%d" % turn)
        ledger.append(b"new")
        assert records(ledger) == records(found(ledger)) == [b"short", b"%d" % turn, b"new"]


def test_a_log_that_is_rewritten_to_nothing_is_empty(ledger: Ledger) -> None:
    for _ in range(3):
        ledger.append(b"old")
        rewritten(ledger)
        assert (records(ledger), records(found(ledger)), ledger.log_bytes) == ([], [], 0)


def test_without_a_commit_the_other_half_is_nothing(ledger: Ledger) -> None:
    """As after a kill in the middle of a compaction."""
    ledger.append(b"1")
    rewriting = ledger.rewrite()
    rewriting.append(b"half")
    ledger.append(b"2")
    assert records(found(ledger)) == [b"1", b"2"]


def test_what_is_appended_during_a_rewriting_is_in_the_log_that_is_left(ledger: Ledger) -> None:
    ledger.append(b"1")
    rewriting = ledger.rewrite()
    rewriting.append(b"one")
    ledger.append(b"2")
    rewriting.append(b"2")
    assert records(ledger) == [b"1", b"2"]
    rewriting.commit()
    assert records(ledger) == records(found(ledger)) == [b"one", b"2"]


def test_the_memory_of_the_half_that_was_left_is_given_back(ledger: Ledger) -> None:
    for _ in range(100):
        ledger.append(bytes(100_000))
    before = blocks(ledger)
    rewritten(ledger, b"short")
    pieces = sum(1 for _ in ledger.give_back())
    assert pieces == HALF // layout._PIECE
    assert blocks(ledger) < before // 20
    assert records(found(ledger)) == [b"short"]


def test_what_is_given_back_of_a_closed_ledger_is_nothing(ledger: Ledger) -> None:
    pieces = ledger.give_back()
    next(pieces)
    ledger.close()
    assert list(pieces)


@pytest.mark.parametrize("half", [0, 1])
@pytest.mark.parametrize("missing", range(1, 7))
def test_a_log_that_fills_its_half_lies_in_it(
    small_halves: int, ledger: Ledger, half: int, missing: int
) -> None:
    """To the byte: the end of the first half must not be read as the beginning of the second."""
    if half:
        rewritten(ledger)
    last = bytes(small_halves - 4 - missing)
    ledger.append(last)
    assert records(ledger) == records(found(ledger)) == [last]
    rewritten(ledger, b"short")
    assert records(ledger) == records(found(ledger)) == [b"short"]


@pytest.mark.parametrize("half", [0, 1])
def test_a_record_that_does_not_fit_leaves_the_log_as_it_was(
    small_halves: int, ledger: Ledger, half: int
) -> None:
    if half:
        rewritten(ledger)
    ledger.append(b"1")
    with pytest.raises(LedgerFull):
        ledger.append(bytes(small_halves))
    with pytest.raises(LedgerFull):
        ledger.append(bytes(small_halves - 5 - 4))
    with pytest.raises(LedgerFull):
        ledger.rewrite().append(bytes(small_halves - 4))
    ledger.append(b"2")
    assert records(ledger) == records(found(ledger)) == [b"1", b"2"]


def test_two_halves_of_a_ledger_are_as_long_as_they_were_said_to_be(ledger: Ledger) -> None:
    assert os.fstat(ledger.descriptor).st_size == SIZE == LOG + 2 * HALF
    assert blocks(ledger) * 512 < 1 << 20, "what is not touched takes no memory"


# ------------------------------------------------ what cannot be read


def unreadable(descriptor: int) -> str:
    with pytest.raises(LedgerUnreadable) as raised:
        Ledger.open(descriptor)
    os.fstat(descriptor)  # it is still the caller's
    return str(raised.value)


@pytest.mark.parametrize("content", [b"", b"ICPTKEPT", b"garbage" * 100, bytes(SIZE >> 10)])
def test_what_is_no_ledger_is_refused(content: bytes) -> None:
    with tempfile.TemporaryFile() as file:
        file.write(content)
        file.flush()
        assert unreadable(file.fileno()) == "it is not a ledger"


def test_a_socket_is_no_ledger() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        assert unreadable(ours.fileno()) == "it is not a ledger"


@pytest.mark.parametrize(
    ("at", "data", "why"),
    [
        (0, b"ICPTKEPS", "it is not a ledger"),
        (8, word(3, 4), "it has format 3, and this version reads 1, 2"),
        (8, word(0, 4), "it has format 0, and this version reads 1, 2"),
        (16, word(0, 8), "its log ends outside it"),
        (16, word(LOG - 1, 8), "its log ends outside it"),
        (16, word(SIZE, 8), "its log ends outside it"),
        (16, word((1 << 64) - 1, 8), "its log ends outside it"),
    ],
)
def test_a_header_that_makes_no_sense_is_refused(ledger: Ledger, at: int, data: bytes, why: str) -> None:
    ledger.append(b"a record")
    written(ledger, at, data)
    assert unreadable(ledger.descriptor) == why


@pytest.mark.parametrize("size", [4096, LOG, SIZE - 1, SIZE + 4096])
def test_a_ledger_of_another_size_is_refused(ledger: Ledger, size: int) -> None:
    os.ftruncate(ledger.descriptor, size)
    assert unreadable(ledger.descriptor) == "it has another size than a ledger of its format"


def test_a_ledger_that_its_daemon_gave_up_is_refused(ledger: Ledger) -> None:
    ledger.append(b"a record")
    ledger.void()
    assert unreadable(ledger.descriptor) == "its daemon ended it, or gave it up"


@pytest.mark.parametrize("length", [2, 100, 1 << 31, (1 << 32) - 1])
def test_a_frame_that_reaches_beyond_the_log_is_found(ledger: Ledger, length: int) -> None:
    ledger.append(b"1")
    ledger.append(b"2")
    written(ledger, LOG + 5, word(length, 4))
    frames = found(ledger).frames()
    assert next(frames)[0] == b"1"
    with pytest.raises(LedgerUnreadable, match="a frame reaches beyond the log"):
        next(frames)


def test_a_log_that_ends_inside_a_length_is_found(ledger: Ledger) -> None:
    ledger.append(b"1")
    written(ledger, 16, word(LOG + 7, 8))
    with pytest.raises(LedgerUnreadable, match="a frame reaches beyond the log"):
        records(found(ledger))


# ------------------------------------------------ its end


def test_an_inbox_in_use_outlives_the_ledgers_end(ledger: Ledger) -> None:
    inbox = ledger.inbox(2)
    inbox.clear()
    descriptor = ledger.descriptor
    ledger.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)
    inbox.note(5)
    inbox.answered()
    assert inbox.take_over() == b""
