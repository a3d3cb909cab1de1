"""What the keeper closes by itself, and what a thread closes for it: the last close of some files waits for a
process, or for a server that never answers."""

from __future__ import annotations

import _thread
import errno
import os
import select
import socket
from collections.abc import Iterator
from typing import cast

import pytest

from interceptd.keeper.store import Store, close


@pytest.fixture
def by_threads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Descriptors that were given to a thread."""
    given: list[int] = []

    def start_new_thread(function: object, arguments: tuple[int]) -> None:
        assert function is os.close
        given.extend(arguments)
        os.close(*arguments)

    monkeypatch.setattr(_thread, "start_new_thread", start_new_thread)
    return given


@pytest.fixture
def store() -> Iterator[Store]:
    with select.epoll() as epoll:
        yield Store(epoll, 4)


@pytest.fixture
def pair() -> Iterator[tuple[int, socket.socket]]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield ours.detach(), theirs


def test_a_connection_is_closed_at_once(
    store: Store, pair: tuple[int, socket.socket], by_threads: list[int]
) -> None:
    ours, theirs = pair
    store.add("c1", [ours], polled=True)
    store.remove("c1")
    assert theirs.recv(1) == b""
    assert by_threads == []


def test_a_connection_with_something_unread_is_closed_by_a_thread(
    store: Store, pair: tuple[int, socket.socket], by_threads: list[int]
) -> None:
    """A descriptor may have come with it. Of a peer that hung up meanwhile, this is the last close."""
    ours, theirs = pair
    with socket.socket() as brought:
        socket.send_fds(theirs, [b"x"], [brought.fileno()])
    theirs.close()
    store.add("c1", [ours], polled=True)
    store.drop(ours)
    assert by_threads == [ours]


def test_a_connection_that_cannot_be_watched_is_kept_until_it_is_removed(
    pair: tuple[int, socket.socket],
) -> None:
    """The system's room for watches is limited (fs.epoll.max_user_watches)."""

    class Full:
        def register(self, _descriptor: int, _events: int) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    ours, theirs = pair
    store = Store(cast(select.epoll, Full()), 4)
    assert store.add("c1", [ours], polled=True)
    assert store.named() == [("c1", ours)]
    store.remove("c1")
    assert theirs.recv(1) == b""


def test_a_listener_is_closed_by_a_thread(store: Store, by_threads: list[int]) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind("")
        listener.listen()
        store.add("own-vmm", [descriptor := os.dup(listener.fileno())], polled=False)
        store.remove("own-vmm")
    assert by_threads == [descriptor]


def test_what_a_stranger_sends_is_not_looked_at(
    by_threads: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """fstat(2) of a file on FUSE waits for its server."""
    descriptor = os.open(os.devnull, os.O_RDONLY)
    with monkeypatch.context() as patched:
        patched.setattr(os, "fstat", None)
        close(descriptor)
    assert by_threads == [descriptor]
