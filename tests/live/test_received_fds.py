"""Unused descriptors are closed, however long it takes; a peer whose descriptors block forever is refused.

The slow ones are real: closing the last copy of a TCP socket that lingers waits for its peer.
"""

from __future__ import annotations

import os
import resource
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest

from fakes.closers import closing_threads, unclosed
from fakes.eventually import eventually
from fakes.rude_peers import slow_to_close
from intercept_protocol.errors import ProtocolViolation, WireError
from interceptd.connections import closer
from interceptd.connections.closer import Closer
from interceptd.connections.received_fds import KEPT_LIMIT, ReceivedFds

LIMIT = KEPT_LIMIT + 4
"""Of unclosed descriptors."""


class Ends:
    """Our connection to the received descriptors; slow descriptors are released when `peers` is closed."""

    def __init__(self) -> None:
        self.unclosed = unclosed(LIMIT)
        self.fds = ReceivedFds(Closer(self.unclosed))
        self.peers = ExitStack()
        self._sending, self._receiving = socket.socketpair()

    def send(self, *descriptors: int) -> bytes:
        socket.send_fds(self._sending, [b"x"], descriptors)
        return self.receive()

    def receive(self) -> bytes:
        return self.fds.receive(self._receiving, 16)

    def send_slow(self) -> None:
        with slow_to_close(self.peers) as slow:  # the last copy is ours
            self.send(slow.fileno())

    def close(self) -> None:
        self.peers.close()
        self._sending.close()
        self._receiving.close()


@pytest.fixture
def ends(monkeypatch: pytest.MonkeyPatch) -> Iterator[Ends]:
    monkeypatch.setattr(closer, "IDLE_SECONDS", 0)
    eventually(closing_threads, 0)  # those of earlier tests
    ends = Ends()
    yield ends
    ends.close()
    eventually(closing_threads, 0)


def test_more_descriptors_than_any_method_takes_are_closed_at_once_and_counted(ends: Ends) -> None:
    ours, theirs = socket.socketpair()
    with ours:
        with theirs:
            assert ends.send(*[theirs.fileno()] * (KEPT_LIMIT + 3)) == b"x"
        assert ends.fds.received == KEPT_LIMIT + 3
        ends.fds.drop()
        assert (ours.recv(1), ends.fds.received) == (b"", 0)


def test_slow_to_close_descriptors_block_no_peer_until_there_are_too_many(ends: Ends) -> None:
    for _ in range(LIMIT - 1):
        ends.send_slow()
        ends.fds.drop()
    assert ends.unclosed.count == LIMIT - 1
    ends.send_slow()
    with pytest.raises(ProtocolViolation, match="those that were sent take too long to close") as refused:
        ends.fds.drop()
    assert (refused.value.name, refused.value.details) == (
        "ENOSPC",
        {"limit": "unclosed_descriptors_per_uid"},
    )


def test_a_peer_whose_slow_descriptors_are_closed_may_send_more(ends: Ends) -> None:
    for _ in range(LIMIT - 1):
        ends.send_slow()
        ends.fds.drop()
    ends.peers.close()
    eventually(lambda: ends.unclosed.count, 0)
    ends.send_slow()
    ends.fds.drop()
    assert ends.unclosed.count == 1


def test_kept_descriptors_of_a_connection_that_ends_are_closed_without_an_error(ends: Ends) -> None:
    for _ in range(LIMIT):
        ends.send_slow()
        ends.fds.close()
    assert ends.unclosed.count == LIMIT


def test_at_the_limit_nothing_more_is_received_and_what_brings_none_is(ends: Ends) -> None:
    for _ in range(LIMIT):
        ends.send_slow()
        ends.fds.close()
    with pytest.raises(ProtocolViolation, match="take too long to close"):
        ends.send_slow()
    assert (ends.fds.received, ends.unclosed.count) == (0, LIMIT), "they are still on the way"
    ends.peers.close()
    eventually(lambda: ends.unclosed.count, 0)
    assert (ends.receive(), ends.fds.received) == (b"x", 1)


@contextmanager
def free_descriptors(count: int) -> Iterator[None]:
    """This process may open no more than `count` descriptors."""
    taken = [os.dup(0) for _ in range(count)]  # the lowest numbers that are free
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    for descriptor in taken:
        os.close(descriptor)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(taken, default=soft - 1) + 1, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_truncated_descriptors_are_reported_and_those_received_are_closed(ends: Ends) -> None:
    ours, theirs = socket.socketpair()
    with ours:
        with theirs, free_descriptors(2):
            assert ends.send(*[theirs.fileno()] * 3) == b"x"
        ours.settimeout(10)
        assert ours.recv(1) == b""
    with pytest.raises(WireError, match=r"EMFILE: the daemon could receive only 2") as refused:
        ends.fds.take()
    assert refused.value.details == {"received": 2}


def test_descriptors_that_come_after_the_cut_are_closed_until_the_next_request(ends: Ends) -> None:
    ours, theirs = socket.socketpair()
    with ours:
        with theirs:
            with free_descriptors(1):
                ends.send(theirs.fileno(), theirs.fileno())
            ends.send(theirs.fileno())
        ours.settimeout(10)
        assert ours.recv(1) == b""
    ends.fds.drop()
    ends.send(0)
    (taken,) = ends.fds.take()
    os.close(taken)


def test_unexpected_descriptors_are_truncated_without_harm() -> None:
    ours, theirs = socket.socketpair()
    count = unclosed(LIMIT)
    fds = ReceivedFds(Closer(count), 0)
    with ours, theirs, free_descriptors(1):
        socket.send_fds(ours, [b"x"], [ours.fileno(), theirs.fileno()])
        assert fds.receive(theirs, 16) == b"x"
        fds.drop()
    eventually(lambda: count.count, 0)
    assert fds.take() == []
