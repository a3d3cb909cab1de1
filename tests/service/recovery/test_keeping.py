"""Whose the room in the store is."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import closing, suppress
from dataclasses import dataclass, field
from itertools import count
from typing import cast

import pytest
import trio
import trio.testing

from interceptd.config.schema import Limits
from interceptd.connections.connection import Connection
from interceptd.connections.peer import Peer
from interceptd.connections.tenants import Tenant, Tenants
from interceptd.ledger.inbox import LARGE_INBOXES, Inbox
from interceptd.ledger.ledger import Ledger
from interceptd.partition.keeping import Hello, Keeper, Keeping
from interceptd.systemd.fd_store import FdStore, StoreRefused


@dataclass
class _Connected:
    """As much of a connection as a ledger needs."""

    tenant: Tenant
    cookie: int
    descriptor: int
    peer: Peer = field(default_factory=lambda: Peer(1, 1, 1))
    inbox: Inbox | None = None

    def use(self, inbox: Inbox) -> None:
        self.inbox = inbox


@pytest.fixture
def tenant() -> Tenant:
    return Tenants(Limits).of(1)


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


async def test_who_gives_up_joining_takes_no_room(
    keeper: Keeper, manager: socket.socket, ledger: Ledger, tenant: Tenant
) -> None:
    """A connection that ends while the manager is slow was not stored, and gives nothing back."""
    joining = _Connected(tenant, 2, manager.fileno())
    keeping = Keeping(keeper, ledger, tenant, "1")
    with suppress(BlockingIOError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as other:
        other.setblocking(False)
        while other.sendto(b"X=1", manager.getsockname()):
            pass
    assert keeper.store is not None
    keeper.store.adopt(["c1"])  # another one of this VMM
    async with trio.open_nursery() as nursery:
        nursery.start_soon(keeping.join, cast(Connection, joining), Hello("vp", 1))
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    keeping.leave(cast(Connection, joining))
    assert keeper.store.held == 1
    assert keeping._free_inbox("vp") == LARGE_INBOXES


async def test_what_has_ended_counts_for_nobody(keeper: Keeper, manager: socket.socket) -> None:
    keeper.begin(1, "a")
    await fill(keeper, manager, 1, "a")
    keeper.remove("a")
    keeper.end(1, "a")
    manager.recv(4096)
    keeper.begin(1, "b")
    assert await fill(keeper, manager, 1, "b") == 48
