"""The text of a maps file is read in whole records, however it moves, or it is known to be torn."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator

import pytest

from fakes.eventually import PATIENCE
from fakes.low_crowd import take_a_line_away
from fakes.procmaps_parsed import asking_by_parsing
from intercept_protocol.addresses import UaddrRange
from interceptd.address_space import Undecided, proc_text
from interceptd.address_space.live_vma import LiveVma
from interceptd.address_space.proc_text import MmGone, ProcText, Torn
from interceptd.address_space.procmaps import ProcMaps


@pytest.fixture
def text() -> Iterator[ProcText]:
    """Of this process's maps."""
    opened = ProcText(os.open("/proc/self/maps", os.O_RDONLY))
    yield opened
    opened.close()


def pages_of(text: bytes) -> list[tuple[int, int]]:
    spans = [line.split()[0].split(b"-") for line in text.splitlines()]
    return [(int(start, 16) >> 12, int(end, 16) >> 12) for start, end in spans]


def rest_of(text: ProcText) -> bytes:
    return b"".join(iter(text.read, b""))


def test_a_text_that_moves_between_two_reads_shows_every_vma_that_did_not_change(
    text: ProcText, crowd: list[UaddrRange]
) -> None:
    first = text.read()
    take_a_line_away()
    shown = pages_of(first + rest_of(text))
    assert [vma for vma in crowd if (vma.start, vma.end) not in shown] == []


@pytest.mark.usefixtures("crowd")
def test_a_concurrent_reader_of_the_open_file_is_detected(text: ProcText) -> None:
    text.read()
    os.pread(text.fileno(), 1, 0)
    take_a_line_away()
    with pytest.raises(Torn):
        text.read()


def test_after_a_torn_record_the_text_can_be_read_from_its_beginning(
    text: ProcText, crowd: list[UaddrRange]
) -> None:
    text.read()
    os.pread(text.fileno(), 1, 0)
    take_a_line_away()
    with pytest.raises(Torn):
        text.read()
    text.rewind()
    assert {(vma.start, vma.end) for vma in crowd} <= set(pages_of(rest_of(text)))


def test_another_reader_is_harmless_while_the_text_does_not_change(
    text: ProcText, crowd: list[UaddrRange]
) -> None:
    first = text.read()
    os.pread(text.fileno(), 1, 0)
    shown = pages_of(first + rest_of(text))
    assert [shown.count((vma.start, vma.end)) for vma in crowd] == [1] * len(crowd)


def test_a_turn_that_does_not_come_is_undecided(text: ProcText, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proc_text, "TURN_SECONDS", 0.001)
    with text.turn(), pytest.raises(Undecided), text.turn():
        pass
    with text.turn():
        pass


def test_a_turn_that_lasts_too_long_is_undecided_and_the_next_one_continues(
    text: ProcText, crowd: list[UaddrRange], monkeypatch: pytest.MonkeyPatch
) -> None:
    with text.turn():
        shown = pages_of(text.read())
    with monkeypatch.context() as patched:
        patched.setattr(proc_text, "TURN_SECONDS", -1)
        with pytest.raises(Undecided), text.turn():
            text.read()
    with text.turn():
        shown += pages_of(rest_of(text))
    assert {(vma.start, vma.end) for vma in crowd} <= set(shown)


# ------------------------------------------------ files that stand in for a maps file

LOW = b"10000000-10001000 rw-p 00000000 00:00 0 \n"
ACROSS = b"fff00000-100100000 rw-p 00000000 00:00 0 \n"
"""Nine digits after eight: from below 4 GiB to above."""


class StandIn(ProcText):
    """A file whose text the test sets, and whose pieces are as long as its first line."""

    def __init__(self, text: bytes) -> None:
        self._file = os.memfd_create("stand-in")
        super().__init__(self._file)
        self.show(text)

    def show(self, text: bytes) -> None:
        os.ftruncate(self._file, 0)
        os.pwrite(self._file, text, 0)


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    monkeypatch.setattr(proc_text, "PIECE_BYTES", len(LOW))
    opened = StandIn(LOW + ACROSS)
    yield opened
    opened.close()


def test_a_piece_may_begin_with_a_vma_whose_end_has_more_digits(stand_in: StandIn) -> None:
    assert [stand_in.read(), stand_in.read()] == [LOW, ACROSS[: len(LOW)]]


def test_a_start_address_that_lost_digits_is_torn(stand_in: StandIn) -> None:
    """What is left of 7ffffff00000 looks like an address."""
    stand_in.read()
    stand_in.show(LOW[:-4] + b"\n7ff" + b"fff00000-7ffffff10000 rw-p 00000000 00:00 0 \n")
    with pytest.raises(Torn):
        stand_in.read()


@pytest.mark.parametrize("rest", [b"0 kB\n", b"1000-10002000 rw-p 00000000 00:00 0 \n"])
def test_a_piece_that_begins_within_a_record_is_torn(stand_in: StandIn, rest: bytes) -> None:
    stand_in.read()
    stand_in.show(LOW + rest)
    with pytest.raises(Torn):
        stand_in.read()


def test_a_text_that_ends_because_the_process_does_says_so(stand_in: StandIn) -> None:
    stand_in.read()
    stand_in.show(b"")
    with pytest.raises(MmGone):
        stand_in.read()


# ------------------------------------------------ several threads


class SpiedTurn:
    """A lock that tells how many have asked for it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._asked = threading.Semaphore(0)

    def acquire(self, timeout: float) -> bool:
        self._asked.release()
        return self._lock.acquire(timeout=timeout)

    def release(self) -> None:
        self._lock.release()

    def wait_asked(self) -> None:
        assert self._asked.acquire(timeout=PATIENCE)


class HeldText(ProcText):
    """Records which thread reads; the first reader's second read waits until it is released."""

    def __init__(self) -> None:
        super().__init__(os.open("/proc/self/maps", os.O_RDONLY))
        self.readers: list[int] = []
        self.go_on = threading.Event()

    def read(self) -> bytes:
        me = threading.get_ident()
        self.readers.append(me)
        if self.readers.count(me) == 2 and me == self.readers[0]:
            assert self.go_on.wait(PATIENCE)
        return super().read()


def test_a_second_question_reads_nothing_before_the_first_one_is_answered(crowd: list[UaddrRange]) -> None:
    """So the kernel does not render the text again meanwhile."""
    maps = asking_by_parsing(ProcMaps(os.open("/proc/self/maps", os.O_RDONLY)))
    maps.close()
    text, turn = HeldText(), SpiedTurn()
    maps._text, text._turn = text, turn  # type: ignore[assignment]
    answers: list[LiveVma | None] = []
    threads = [threading.Thread(target=lambda: answers.append(maps.vma_at(crowd[-1].start))) for _ in "12"]
    for thread in threads:
        thread.start()
        turn.wait_asked()
    text.go_on.set()
    for thread in threads:
        thread.join(PATIENCE)
    half = len(text.readers) // 2
    assert text.readers == [text.readers[0]] * half + [text.readers[-1]] * half
    assert [vma and (vma.start, vma.end) for vma in answers] == [(crowd[-1].start, crowd[-1].end)] * 2
    maps.close()
