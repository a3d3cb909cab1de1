"""Descriptors are closed in a few threads for each uid, and counted until then, however long it takes.

The slow ones are real: closing the last copy of a TCP socket that lingers waits for its peer.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from fakes.closers import closer, closing_threads, hung_up, unclosed, watched_descriptor
from fakes.eventually import eventually
from fakes.rude_peers import slow_to_close
from intercept_protocol.errors import WireError
from interceptd.connections import closer as module
from interceptd.connections.closer import THREADS, Closer

UNUSED = 1 << 20
"""No descriptor of ours, so that its close fails, as of a file on NFS or FUSE it may."""


@pytest.fixture(autouse=True)
def peers(monkeypatch: pytest.MonkeyPatch) -> Iterator[ExitStack]:
    """What is slow to close gets closed once these are; idle threads end at once."""
    monkeypatch.setattr(module, "IDLE_SECONDS", 0)
    eventually(closing_threads, 0)  # those of earlier tests
    with ExitStack() as peers:
        yield peers
    eventually(closing_threads, 0)


def close_slow(tested: Closer, peers: ExitStack, count: int) -> None:
    for _ in range(count):
        tested.close([slow_to_close(peers).detach()])


def is_serving(tested: Closer) -> bool:
    with watched_descriptor() as (peer, descriptor):
        tested.close([descriptor])
        return hung_up(peer)


def test_however_much_there_is_to_close_a_few_threads_do_it(peers: ExitStack) -> None:
    tested = closer()
    close_slow(tested, peers, THREADS)
    with ExitStack() as watched:
        pairs = [watched.enter_context(watched_descriptor()) for _ in range(3 * THREADS)]
        for _, descriptor in pairs:
            tested.close([descriptor])
        eventually(closing_threads, THREADS)
        peers.close()
        assert all(hung_up(peer) for peer, _ in pairs)


def test_one_thread_closes_what_comes_after(monkeypatch: pytest.MonkeyPatch) -> None:
    """It costs more to start one than to close most descriptors."""
    monkeypatch.setattr(module, "IDLE_SECONDS", 1)
    count = unclosed(8)
    tested = Closer(count)
    for _ in range(3):
        assert is_serving(tested)
        eventually(lambda: count.count, 0)
        assert closing_threads() == 1


def test_closes_that_take_long_hold_up_neither_others_of_the_uid_nor_another_uid(peers: ExitStack) -> None:
    tested, another = closer(), closer()
    close_slow(tested, peers, THREADS - 1)
    assert is_serving(tested)
    close_slow(tested, peers, 1)
    assert is_serving(another)


def test_what_is_not_closed_counts_and_leaves_no_room_for_more_until_it_is(peers: ExitStack) -> None:
    count = unclosed(THREADS + 2)
    tested = Closer(count)
    close_slow(tested, peers, THREADS + 1)
    tested.require_room()
    tested.hold(2)
    with pytest.raises(WireError, match=f"uid 7 may have {THREADS + 2} unclosed descriptors") as refused:
        tested.require_room()
    assert (refused.value.name, refused.value.details) == (
        "ENOSPC",
        {"limit": "unclosed_descriptors_per_uid"},
    )
    assert count.count == THREADS + 3, "what is here already counts beyond the limit too"
    tested.free(2)
    peers.close()
    eventually(lambda: count.count, 0)
    tested.require_room()


def test_a_descriptor_whose_close_fails_keeps_no_other_open() -> None:
    count = unclosed(8)
    with watched_descriptor() as (peer, descriptor):
        Closer(count).close([UNUSED, descriptor])
        assert hung_up(peer)
    eventually(lambda: count.count, 0)


def test_without_a_thread_descriptors_wait_for_the_next() -> None:
    count = unclosed(8)
    tested = Closer(count)
    with watched_descriptor() as (peer, descriptor):
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(threading.Thread, "start", no_thread)
            tested.close([descriptor])
        assert (count.count, closing_threads()) == (1, 0)
        assert is_serving(tested)
        assert hung_up(peer)


def no_thread(_: threading.Thread) -> None:
    raise RuntimeError("can't start new thread")


def test_a_connection_with_unread_descriptors_is_closed_in_a_thread_and_its_peer_reads_the_last_message(
    peers: ExitStack,
) -> None:
    """Closed with unread bytes it would be reset, and the peer would not find our message."""
    count = unclosed(8)
    with watched_descriptor() as (peer, descriptor):
        slow = slow_to_close(peers)
        with slow:
            socket.send_fds(peer, [b"never read"], [slow.fileno()])
        with socket.socket(fileno=descriptor) as ours:
            ours.setblocking(False)
            ours.send(b"farewell")
            Closer(count).close_connection(ours.detach())
        assert count.count == 1
        assert peer.recv(16) == b"farewell"
        peers.close()
        assert hung_up(peer)
    eventually(lambda: count.count, 0)
