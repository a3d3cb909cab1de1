"""Whose the room in the store is."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import closing
from itertools import count

import pytest

from interceptd.partition.keeping import Keeper
from interceptd.systemd.fd_store import FdStore, StoreRefused


@pytest.fixture
def manager() -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listening:
        listening.bind("")  # in the abstract namespace, unix(7)
        yield listening


@pytest.fixture
def store(manager: socket.socket) -> Iterator[FdStore]:
    with closing(FdStore(manager.getsockname().decode(), capacity=64)) as store:
        yield store


@pytest.fixture
def keeper(store: FdStore) -> Keeper:
    return Keeper(store, lambda *_: None, lambda _: None)


async def fill(keeper: Keeper, manager: socket.socket, uid: int, key: str) -> int:
    """Store until it is refused; returns how much was stored."""
    assert keeper.store is not None
    for stored in count():
        try:
            keeper.require_share(uid, 1)
        except StoreRefused:
            return stored
        await keeper.store.store(f"c{key}", [manager.fileno()], poll=True)
        manager.recv(4096)
    raise AssertionError


async def test_no_uid_takes_all_of_the_store_from_the_next(keeper: Keeper, manager: socket.socket) -> None:
    for uid, key in ((1, "a"), (2, "b"), (3, "c"), (1, "d")):
        keeper.begin(uid, key)
    assert await fill(keeper, manager, 1, "a") == 48
    assert await fill(keeper, manager, 1, "d") == 0
    assert await fill(keeper, manager, 2, "b") == 12
    assert await fill(keeper, manager, 3, "c") == 3


async def test_what_has_ended_counts_for_nobody(keeper: Keeper, manager: socket.socket) -> None:
    keeper.begin(1, "a")
    await fill(keeper, manager, 1, "a")
    keeper.remove("a")
    keeper.end(1, "a")
    manager.recv(4096)
    keeper.begin(1, "b")
    assert await fill(keeper, manager, 1, "b") == 48
