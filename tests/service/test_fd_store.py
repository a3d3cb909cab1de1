"""The daemon's side of the descriptor store: what it sends and counts, and what it does without a manager."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest
import structlog
import trio

from interceptd.systemd.fd_store import CAPACITY, SEND_SECONDS, FdStore, StoreRefused


class Heard(NamedTuple):
    facts: str
    inodes: tuple[int, ...]


class Manager:
    """A service manager that hears what is stored, and keeps nothing."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(address)
        self.socket.setblocking(False)

    def hear(self) -> Heard:
        """The next datagram, with the inode of each descriptor; BlockingIOError without one."""
        data, descriptors, _, _ = socket.recv_fds(self.socket, 4096, 253)
        inodes = tuple(os.fstat(descriptor).st_ino for descriptor in descriptors)
        for descriptor in descriptors:
            os.close(descriptor)
        return Heard(data.decode(), inodes)

    def hear_all(self) -> list[str]:
        heard = []
        with suppress(BlockingIOError):
            while True:
                heard.append(self.hear().facts)
        return heard

    def stop_reading(self) -> None:
        """Fill its queue."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as other, suppress(BlockingIOError):
            other.setblocking(False)
            while other.sendto(b"X=1", self.address):
                pass


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[Manager]:
    manager = Manager(str(tmp_path / "notify"))
    with manager.socket:
        yield manager


@pytest.fixture
def store(manager: Manager) -> Iterator[FdStore]:
    store = FdStore(manager.address, 4)
    yield store
    store.close()


@pytest.fixture
def descriptors() -> Iterator[list[int]]:
    """Three, of three files."""
    with ExitStack() as closing:
        sockets = [closing.enter_context(socket.socket()) for _ in range(3)]
        yield [each.fileno() for each in sockets]


def inodes(descriptors: list[int]) -> tuple[int, ...]:
    return tuple(os.fstat(descriptor).st_ino for descriptor in descriptors)


async def test_descriptors_are_stored_by_one_datagram_in_their_order(
    store: FdStore, manager: Manager, descriptors: list[int]
) -> None:
    await store.store("m1", descriptors, poll=False)
    await store.store("c1", descriptors[:1], poll=True)
    assert [manager.hear(), manager.hear()] == [
        ("FDSTORE=1\nFDNAME=m1\nFDPOLL=0", inodes(descriptors)),
        ("FDSTORE=1\nFDNAME=c1", inodes(descriptors[:1])),
    ]
    assert store.held == 4


async def test_a_full_store_refuses_before_it_sends_and_a_removal_gives_room(
    store: FdStore, manager: Manager, descriptors: list[int]
) -> None:
    store.adopt(["d", "p1"])
    with pytest.raises(StoreRefused, match="the store holds 2 of 4"):
        await store.store("m1", descriptors, poll=False)
    assert (store.held, store.works, manager.hear_all()) == (2, True, [])
    store.remove("p1")
    await store.store("m1", descriptors, poll=False)
    assert store.held == 4
    assert manager.hear_all() == ["FDSTOREREMOVE=1\nFDNAME=p1", "FDSTORE=1\nFDNAME=m1\nFDPOLL=0"]


async def test_a_name_is_removed_with_all_its_descriptors_and_an_unknown_one_is_not_sent(
    store: FdStore, manager: Manager, descriptors: list[int]
) -> None:
    await store.store("m1", descriptors, poll=False)
    manager.hear()
    store.remove("m1")
    store.remove("m1")
    assert (store.held, manager.hear_all()) == (0, ["FDSTOREREMOVE=1\nFDNAME=m1"])


async def test_a_connection_that_hung_up_gives_its_room_back_alone(
    store: FdStore, descriptors: list[int]
) -> None:
    await store.store("c1", descriptors, poll=True)
    store.hung_up("c1")
    store.hung_up("c2")
    assert store.held == 2


async def test_a_slow_manager_is_waited_for_a_second_and_nothing_is_stored(
    store: FdStore, manager: Manager, descriptors: list[int], autojump_clock: trio.testing.MockClock
) -> None:
    manager.stop_reading()
    with pytest.raises(StoreRefused, match=f"has not read for {SEND_SECONDS} s"):
        await store.store("m1", descriptors, poll=False)
    assert trio.current_time() == pytest.approx(SEND_SECONDS)
    assert (store.held, store.works, autojump_clock.rate) == (0, True, 0)
    manager.hear_all()
    await store.store("m1", descriptors, poll=False)
    assert store.held == 3


async def test_a_manager_that_reads_in_time_gets_what_waited(
    store: FdStore, manager: Manager, descriptors: list[int]
) -> None:
    manager.stop_reading()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(lambda: store.store("m1", descriptors, poll=False))
        await trio.testing.wait_all_tasks_blocked()
        assert store.held == 3  # so that others that store meanwhile see the room taken
        manager.hear_all()
    assert manager.hear() == ("FDSTORE=1\nFDNAME=m1\nFDPOLL=0", inodes(descriptors))


async def test_several_may_wait_for_a_manager_at_once(
    store: FdStore, manager: Manager, descriptors: list[int]
) -> None:
    store.adopt(["p1"])
    manager.stop_reading()
    store.remove("p1")
    async with trio.open_nursery() as nursery:
        for name in ("c1", "c2"):
            nursery.start_soon(partial(store.store, name, descriptors[:1], poll=True))
            await trio.testing.wait_all_tasks_blocked()
        nursery.start_soon(store.settle)
        await trio.testing.wait_all_tasks_blocked()
        heard: list[str] = []
        while "BARRIER=1" not in heard:
            heard += manager.hear_all()
            await trio.testing.wait_all_tasks_blocked()
    assert [each for each in heard if each != "X=1"] == [
        "FDSTOREREMOVE=1\nFDNAME=p1",
        "FDSTORE=1\nFDNAME=c1",
        "FDSTORE=1\nFDNAME=c2",
        "BARRIER=1",
    ]


async def test_all_who_wait_for_a_slow_manager_wait_together(
    store: FdStore, manager: Manager, descriptors: list[int]
) -> None:
    """A VMM attaches hundreds of VPs at once, and each waits for an answer."""
    manager.stop_reading()

    async def refused(descriptor: int) -> None:
        with pytest.raises(StoreRefused, match="has not read"):
            await store.store("c1", [descriptor], poll=True)

    began = trio.current_time()
    async with trio.open_nursery() as nursery:
        for descriptor in descriptors:
            nursery.start_soon(refused, descriptor)
    assert trio.current_time() - began == SEND_SECONDS
    assert store.held == 0


async def test_a_store_that_is_cancelled_stored_nothing(
    store: FdStore, manager: Manager, descriptors: list[int]
) -> None:
    manager.stop_reading()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(lambda: store.store("m1", descriptors, poll=False))
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    assert (store.held, store.works) == (0, True)
    assert {*manager.hear_all()} == {"X=1"}


async def test_a_removal_that_finds_no_room_is_sent_before_what_is_stored_next(
    store: FdStore, manager: Manager, descriptors: list[int]
) -> None:
    store.adopt(["p1"])
    manager.stop_reading()
    store.remove("p1")
    assert store.held == 1
    manager.hear_all()
    await store.store("m1", descriptors, poll=True)
    assert manager.hear_all() == ["FDSTOREREMOVE=1\nFDNAME=p1", "FDSTORE=1\nFDNAME=m1"]


async def test_a_manager_that_is_gone_is_logged_once_and_asked_no_more(
    store: FdStore, manager: Manager, descriptors: list[int]
) -> None:
    manager.socket.close()
    with structlog.testing.capture_logs() as logged:
        for why in ("Connection refused", "that kept descriptors is gone"):
            with pytest.raises(StoreRefused, match=why):
                await store.store("m1", descriptors, poll=False)
            assert store.works is False
    assert [line["event"] for line in logged] == ["descriptors_not_stored"]


async def test_a_removal_can_be_what_finds_the_manager_gone(store: FdStore, manager: Manager) -> None:
    store.adopt(["p1"])
    manager.socket.close()
    store.remove("p1")
    assert store.works is False


async def test_settling_waits_until_the_manager_has_read_all_that_was_sent(
    store: FdStore, manager: Manager, descriptors: list[int]
) -> None:
    await store.store("m1", descriptors, poll=False)
    store.remove("m1")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(store.settle)
        await trio.testing.wait_all_tasks_blocked()
        assert len(nursery.child_tasks) == 1
        assert manager.hear_all()[-2:] == ["FDSTOREREMOVE=1\nFDNAME=m1", "BARRIER=1"]


@pytest.mark.parametrize("state", ["slow", "silent", "gone"])
async def test_settling_gives_a_manager_a_second(
    store: FdStore, manager: Manager, state: str, autojump_clock: trio.testing.MockClock
) -> None:
    match state:
        case "slow":
            manager.stop_reading()
        case "gone":
            manager.socket.close()
    await store.settle()
    assert trio.current_time() == pytest.approx(0 if state == "gone" else SEND_SECONDS)
    assert autojump_clock.rate == 0


def test_a_manager_that_was_never_there_keeps_nothing(tmp_path: Path) -> None:
    store = FdStore(str(tmp_path / "gone"))
    assert store.works is False
    store.close()


async def test_a_descriptor_that_is_not_open_is_refused_and_the_store_still_works(store: FdStore) -> None:
    with pytest.raises(StoreRefused, match="Bad file descriptor"):
        await store.store("m1", [1_000_000], poll=False)
    assert (store.held, store.works) == (0, True)


@pytest.mark.parametrize(
    ("environment", "capacity"),
    [
        ({}, None),
        ({"FDSTORE": "0"}, None),
        ({"FDSTORE": "many"}, None),
        ({"INTERCEPTD_KEEP": "no"}, None),
        ({"INTERCEPTD_KEEP": "yes"}, CAPACITY),
        ({"FDSTORE": "7"}, 7),
        ({"FDSTORE": "7", "INTERCEPTD_KEEP": "yes"}, 7),
    ],
)
async def test_the_environment_says_whether_and_how_much_is_kept(
    environment: dict[str, str], capacity: int | None, manager: Manager, descriptors: list[int]
) -> None:
    assert FdStore.from_environment(environment) is None  # no manager
    store = FdStore.from_environment(environment | {"NOTIFY_SOCKET": manager.address})
    if store is None or capacity is None:
        assert (store, capacity) == (None, None)
        return
    store.adopt(["d"] * (capacity - 1))
    await store.store("p1", descriptors[:1], poll=False)
    with pytest.raises(StoreRefused, match=f"the store holds {capacity} of {capacity}"):
        await store.store("p2", descriptors[:1], poll=False)
    store.close()
