"""The keeper's deadlines, by a clock that the test moves: who waits how long, and what ends the wait."""

from __future__ import annotations

import errno
import os
import select
import signal
import socket
import time
from collections.abc import Iterator, Sequence

import pytest

from interceptd.keeper import child, keeper
from interceptd.keeper.keeper import CHECK_SECONDS, LONGEST_PAUSE, SHORTEST_PAUSE, Keeper
from interceptd.keeper.notify_socket import Message

PATIENCE = 10.0
CHECK = -99


class Rig:
    """A keeper whose programs are numbers, and who signals nobody."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        self.started = 0
        self.signals: list[tuple[int, int]] = []
        monkeypatch.setattr(time, "monotonic", lambda: self.now)
        monkeypatch.setattr(child, "start", self._start)
        monkeypatch.setattr(os, "kill", lambda pid, number: self.signals.append((pid, number)))
        monkeypatch.setattr(os, "posix_spawn", lambda *_, **__: CHECK)
        monkeypatch.setattr(keeper, "_capacity", lambda: 8)
        self.keeper = Keeper(["program"], ["serve"], PATIENCE)
        self.keeper._start()

    def _start(self, *_: object) -> int:
        self.started += 1
        return -self.started

    def pass_time(self, seconds: float) -> None:
        self.now += seconds
        self.keeper._look_at_the_clock()

    def hear(self, *facts: str, descriptors: Sequence[int] = ()) -> None:
        stated = dict(fact.split("=", 1) for fact in facts)
        self.keeper._obey(Message(-self.started, stated, [*descriptors], complete=True))

    def end(self, code: int = -signal.SIGKILL) -> None:
        self.keeper._ended(code)

    def wait(self) -> float | None:
        return self.keeper._seconds_to_wait()

    def close(self) -> None:
        self.keeper._store.let_go()
        for each in (self.keeper._wakes, self.keeper._wake, self.keeper._notify._socket):
            each.close()


@pytest.fixture
def rig(monkeypatch: pytest.MonkeyPatch) -> Iterator[Rig]:
    rig = Rig(monkeypatch)
    yield rig
    rig.close()


@pytest.fixture
def down(rig: Rig) -> Iterator[socket.socket]:
    """A program that was ready died, and one that takes over was started; the peer of what is kept."""
    ours, peer = socket.socketpair()
    with peer:
        rig.hear("READY=1")
        rig.hear("FDSTORE=1", "FDNAME=c1", descriptors=[ours.detach()])
        rig.end()
        yield peer


def cut_off(peer: socket.socket) -> bool:
    return bool(select.select([peer], [], [], 0)[0])


def test_peers_wait_for_the_patience_and_a_program_that_is_not_ready_by_then_is_killed(
    rig: Rig, down: socket.socket
) -> None:
    """It has duplicates: of a userfaultfd, too, for which munmaps wait."""
    assert rig.wait() == PATIENCE
    rig.pass_time(PATIENCE - 0.1)
    assert (cut_off(down), rig.signals) == (False, [])
    rig.pass_time(0.1)
    assert (cut_off(down), rig.signals, rig.wait()) == (True, [(-2, signal.SIGKILL)], None)


def test_the_patience_counts_from_the_death_of_the_program_that_served(rig: Rig, down: socket.socket) -> None:
    rig.pass_time(PATIENCE - 1)
    rig.end()
    rig.pass_time(1)
    assert cut_off(down)


@pytest.mark.parametrize(
    ("fact", "wait"),
    [
        ("READY=1", None),
        ("EXTEND_TIMEOUT_USEC=60000000", 60.0),
        ("EXTEND_TIMEOUT_USEC=1000000", PATIENCE - 1),
        ("EXTEND_TIMEOUT_USEC=long", PATIENCE - 1),
    ],
)
def test_a_program_that_is_ready_or_asks_for_time_gets_more_and_never_less(
    fact: str, wait: float | None, rig: Rig, down: socket.socket
) -> None:
    rig.pass_time(1)
    rig.hear(fact)
    assert (rig.wait(), cut_off(down)) == (wait, False)


def test_while_nothing_is_kept_a_program_may_take_its_time(rig: Rig) -> None:
    rig.hear("READY=1")
    rig.end()
    assert (rig.started, rig.wait()) == (2, None)


def test_a_program_that_does_not_become_ready_is_started_again_after_growing_pauses(rig: Rig) -> None:
    rig.hear("READY=1")
    rig.end()
    pauses = []
    for _ in range(7):
        rig.end(1)
        pauses.append(rig.wait() or 0)
        started = rig.started
        rig.pass_time(pauses[-1] / 2)
        assert rig.started == started
        rig.pass_time(pauses[-1])
        assert rig.started == started + 1
    assert pauses == pytest.approx([min(SHORTEST_PAUSE * 2**n, LONGEST_PAUSE) for n in range(7)])
    rig.hear("READY=1")
    rig.end()
    rig.end()
    assert rig.wait() == pytest.approx(SHORTEST_PAUSE)


def test_a_signal_to_end_waits_for_a_program_that_takes_over_as_long_as_its_peers_do(
    rig: Rig, down: socket.socket
) -> None:
    rig.keeper._obey_signal(signal.SIGTERM)
    assert rig.signals == []
    rig.pass_time(PATIENCE)
    assert (rig.signals, cut_off(down)) == ([(-2, signal.SIGKILL)], True)
    rig.end()
    assert rig.keeper._done


def test_a_second_signal_to_end_does_not_wait(rig: Rig, down: socket.socket) -> None:
    for _ in range(2):
        rig.keeper._obey_signal(signal.SIGTERM)
    assert (rig.signals, cut_off(down)) == ([(-2, signal.SIGINT)], False)


def test_a_signal_to_end_between_two_programs_ends_at_once(rig: Rig, down: socket.socket) -> None:
    rig.end(1)
    rig.keeper._obey_signal(signal.SIGTERM)
    assert (rig.keeper._done, rig.keeper._status, cut_off(down)) == (True, 1, False)


def test_a_check_that_takes_too_long_is_killed_and_refuses_the_restart(rig: Rig) -> None:
    rig.hear("READY=1")
    for _ in range(2):
        rig.keeper._obey_signal(signal.SIGUSR1)
    assert rig.wait() == CHECK_SECONDS
    rig.pass_time(CHECK_SECONDS)
    assert rig.signals == [(CHECK, signal.SIGKILL)]
    rig.keeper._checked(-signal.SIGKILL)
    assert (rig.signals, rig.wait()) == ([(CHECK, signal.SIGKILL)], None)


def test_a_system_that_refuses_a_process_is_asked_again_later(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> int:
        raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")

    rig.hear("READY=1")
    with monkeypatch.context() as refusing:
        refusing.setattr(os, "posix_spawn", refuse)
        refusing.setattr(child, "start", refuse)
        rig.keeper._obey_signal(signal.SIGUSR1)
        assert rig.wait() is None
        rig.end()
    assert rig.wait() == pytest.approx(SHORTEST_PAUSE)
    rig.pass_time(SHORTEST_PAUSE)
    assert rig.started == 2


@pytest.mark.usefixtures("down")
def test_a_reload_waits_for_a_program_that_takes_over(rig: Rig) -> None:
    """Before it handles SIGHUP, the signal would kill it."""
    for _ in range(2):
        rig.keeper._obey_signal(signal.SIGHUP)
    assert rig.signals == []
    rig.hear("READY=1")
    assert rig.signals == [(-2, signal.SIGHUP)]


def test_what_a_program_said_before_it_ended_is_heard_before_it_is_reaped(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its end may be found by the signal of another process's."""
    ours = os.getpid()
    reaped = iter([(ours, signal.SIGKILL), (0, 0)])
    monkeypatch.setattr(os, "waitpid", lambda *_: next(reaped))
    rig.keeper._pid = ours
    first, second = socket.socketpair()
    with first, second, socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
        notify.connect("\0" + rig.keeper._notify.name[1:])
        socket.send_fds(notify, [b"FDSTORE=1\nFDNAME=c1\nREADY=1"], [first.fileno()])
        rig.keeper._reap()
    assert (len(rig.keeper._store), rig.started) == (1, 2)
