"""Unused descriptors are closed, however long it takes; a peer whose descriptors block forever is refused.

The slow ones are real: closing the last copy of a TCP socket that lingers waits for its peer.
"""

from __future__ import annotations

import os
import resource
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest

from fakes.eventually import eventually
from fakes.rude_peers import slow_to_close
from intercept_protocol.errors import ProtocolViolation, WireError
from interceptd.connections.received_fds import CLOSING_LIMIT, KEPT_LIMIT, ReceivedFds


class Ends:
    """Our connection to the received descriptors; slow descriptors are released when `peers` is closed."""

    def __init__(self) -> None:
        self.fds = ReceivedFds()
        self.peers = ExitStack()
        self._sending, self._receiving = socket.socketpair()

    def send(self, *descriptors: int) -> bytes:
        socket.send_fds(self._sending, [b"x"], descriptors)
        return self.fds.receive(self._receiving, 16)

    def send_slow(self) -> None:
        with slow_to_close(self.peers) as slow:  # the last copy is ours
            self.send(slow.fileno())

    def close(self) -> None:
        self.peers.close()
        self._sending.close()
        self._receiving.close()


@pytest.fixture
def ends() -> Iterator[Ends]:
    ends = Ends()
    yield ends
    ends.close()
    eventually(closing, 0)


def closing() -> int:
    """Threads that are still closing something."""
    return sum(thread.name == "close descriptors" for thread in threading.enumerate())


def test_more_descriptors_than_any_method_takes_are_closed_at_once_and_counted(ends: Ends) -> None:
    ours, theirs = socket.socketpair()
    with ours:
        with theirs:
            assert ends.send(*[theirs.fileno()] * (KEPT_LIMIT + 3)) == b"x"
        assert ends.fds.received == KEPT_LIMIT + 3
        ends.fds.drop()
        assert (ours.recv(1), ends.fds.received) == (b"", 0)


def test_slow_to_close_descriptors_block_no_peer_until_there_are_too_many(ends: Ends) -> None:
    for _ in range(CLOSING_LIMIT):
        ends.send_slow()
        ends.fds.drop()
    assert closing() == CLOSING_LIMIT
    ends.send_slow()
    with pytest.raises(ProtocolViolation, match="the descriptors that were sent take too long to close"):
        ends.fds.drop()


def test_a_peer_whose_slow_descriptors_are_closed_may_send_more(ends: Ends) -> None:
    for _ in range(CLOSING_LIMIT):
        ends.send_slow()
        ends.fds.drop()
    ends.peers.close()
    eventually(closing, 0)
    ends.send_slow()
    ends.fds.drop()
    assert closing() == 1


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
    fds = ReceivedFds(0)
    with ours, theirs, free_descriptors(1):
        socket.send_fds(ours, [b"x"], [ours.fileno(), theirs.fileno()])
        assert fds.receive(theirs, 16) == b"x"
        fds.drop()
    eventually(closing, 0)
    assert fds.take() == []


def test_where_the_system_refuses_a_thread_the_peer_is_refused_and_the_next_closes_its_descriptors(
    ends: Ends,
) -> None:
    ours, theirs = socket.socketpair()
    with ours:
        with theirs:
            ends.send(theirs.fileno())
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(threading.Thread, "start", no_thread)
            with pytest.raises(ProtocolViolation, match="no thread available to close the descriptors"):
                ends.fds.drop()
        ends.send(ours.fileno())
        ends.fds.drop()
        assert ours.recv(1) == b""


def no_thread(_: threading.Thread) -> None:
    raise RuntimeError("can't start new thread")
