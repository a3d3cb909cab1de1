"""Requests that are sent before an earlier one is answered wait in the socket, each with its descriptors."""

from __future__ import annotations

import array
import errno
import os
import socket
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from itertools import pairwise

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from fakes.eventually import eventually
from fakes.others import Others
from fakes.raw_peer import RawPeer
from fakes.running import Running
from intercept_protocol import rpc
from intercept_protocol.errors import ProtocolViolation, WireError
from interceptd.config.schema import Limits
from interceptd.connections import request_reader
from interceptd.connections.connection import REST_SECONDS, Connection, ConnectionGone
from interceptd.connections.fairness import TURN
from interceptd.connections.hangup_watch import HangupWatch
from interceptd.connections.received_fds import ReceivedFds
from interceptd.connections.request_reader import RequestReader
from interceptd.connections.tenants import Tenants
from interceptd.connections.unread import LOOK_LIMIT, may_bring_descriptors, unread_bytes

FIRST, SECOND, THIRD = (rpc.encode_request(msgid, "statistics", [{"a": 1}]) for msgid in (1, 2, 3))
LARGEST = rpc.encode_request(4, "statistics", [bytes(65_400)])
"""About as large as a request may be."""
BIG_BUFFER = 1 << 20
UNHURRIED = Limits(control_requests_per_second=1_000_000)
"""No request waits for the pace of its uid."""
pytestmark = pytest.mark.usefixtures("reading")


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, socket.socket]]:
    """The daemon's end and the peer's, which has room for the largest request and others."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BIG_BUFFER)
        yield ours, theirs


@pytest.fixture(params=["looks", "does not look"])
def reading(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether the end of a request is found by a look, or reached in small steps, as in a long queue."""
    if request.param == "does not look":
        monkeypatch.setattr(request_reader, "is_long", lambda _: True)


@pytest.fixture
async def connection(ends: tuple[socket.socket, socket.socket], nursery: trio.Nursery) -> Connection:
    watch = HangupWatch()
    nursery.start_soon(watch.run)
    return Connection(ends[0], Tenants(lambda: UNHURRIED), watch)


async def msgids(connection: Connection, count: int) -> list[int]:
    received = [await connection.receive() for _ in range(count)]
    return [request.msgid for request in received if request is not None]


async def waiting_for_ever() -> bytes:
    await trio.sleep_forever()


# ------------------------------------------------ one after the other


async def test_requests_that_came_at_once_are_received_in_order(
    connection: Connection, ends: tuple[socket.socket, socket.socket]
) -> None:
    ends[1].send(FIRST + SECOND + THIRD)
    assert await msgids(connection, 3) == [1, 2, 3]


async def test_a_later_request_stays_in_the_socket(
    connection: Connection, ends: tuple[socket.socket, socket.socket]
) -> None:
    ends[1].send(FIRST + SECOND + THIRD[:5])
    await connection.receive()
    assert unread_bytes(ends[0]) == len(SECOND) + 5
    await connection.receive()
    assert unread_bytes(ends[0]) == 5


async def test_requests_are_received_wherever_the_stream_was_cut(
    connection: Connection, ends: tuple[socket.socket, socket.socket], nursery: trio.Nursery
) -> None:
    stream = FIRST + SECOND
    for cut in range(1, len(stream)):
        ends[1].send(stream[:cut])
        receiving = Running(nursery, msgids, connection, 2)
        await wait_all_tasks_blocked()
        ends[1].send(stream[cut:])
        assert await receiving.result() == [1, 2]


async def test_the_largest_request_is_received_without_what_follows_it(
    connection: Connection, ends: tuple[socket.socket, socket.socket]
) -> None:
    ends[1].send(LARGEST + FIRST)
    assert await msgids(connection, 1) == [4]
    assert unread_bytes(ends[0]) == len(FIRST)
    assert await msgids(connection, 1) == [1]


async def test_a_cancelled_receive_loses_none_of_several_requests(
    connection: Connection, ends: tuple[socket.socket, socket.socket], nursery: trio.Nursery
) -> None:
    """Cancelled while it waits for bytes, and while its uid keeps the pace."""
    ends[1].send(FIRST[:-1])
    receiving = Running(nursery, connection.receive)
    await wait_all_tasks_blocked()
    assert await receiving.cancel()
    ends[1].send(FIRST[-1:] + SECOND)
    receiving = Running(nursery, connection.receive)
    async with connection.tenant._queue:
        await wait_all_tasks_blocked()
        assert await receiving.cancel()
    assert await msgids(connection, 2) == [1, 2]


async def test_a_malformed_request_is_found_when_the_one_before_it_was_answered(
    connection: Connection, ends: tuple[socket.socket, socket.socket]
) -> None:
    ends[1].send(FIRST + b"\xc1" + SECOND)
    assert await msgids(connection, 1) == [1]
    with pytest.raises(ProtocolViolation, match="EBADMSG"):
        await connection.receive()


async def test_a_peer_that_never_reads_nor_pauses_does_not_starve_others(
    connection: Connection, ends: tuple[socket.socket, socket.socket], nursery: trio.Nursery
) -> None:
    request = rpc.encode_request(1, "statistics", [{"a": bytes(200)}])
    flood = (1 << 16) // len(request)
    ends[1].send(request * flood)
    others = Others(nursery)
    assert await msgids(connection, flood) == [1] * flood
    assert others.turns >= flood // TURN - 1


# ------------------------------------------------ descriptors


Sent = tuple[bytes, int]
"""Bytes of one send, and how many descriptors come along."""
SENDS: dict[str, tuple[Sequence[Sent], dict[int, int]]] = {
    "directly behind": ([(FIRST, 1), (SECOND, 0)], {1: 1, 2: 0}),
    "directly before": ([(FIRST, 0), (SECOND, 1)], {1: 0, 2: 1}),
    "each its own": ([(FIRST, 1), (SECOND, 2), (THIRD, 3)], {1: 1, 2: 2, 3: 3}),
    "in one send with the next": ([(FIRST + SECOND, 1)], {1: 1, 2: 0}),
    "with the second byte of a request": ([(FIRST + SECOND[:1], 0), (SECOND[1:], 1)], {1: 0, 2: 1}),
    "with the last byte of a request": ([(FIRST[:-1], 0), (FIRST[-1:] + SECOND, 1)], {1: 1, 2: 0}),
    "behind the largest": ([(LARGEST[:30_000], 1), (LARGEST[30_000:], 0), (FIRST, 1)], {4: 1, 1: 1}),
    "byte by byte": (
        [(bytes([byte]), int(not at % len(FIRST))) for at, byte in enumerate(FIRST + SECOND)],
        {1: 1, 2: 1},
    ),
    "a descriptor with each byte": ([(bytes([byte]), at < 2) for at, byte in enumerate(FIRST)], {1: 2}),
}


def send(end: socket.socket, data: bytes, count: int, kept: ExitStack, flags: int = 0) -> list[int]:
    """Send `data` and the ends of so many pipes; returns the inodes of these."""
    passed, inodes = array.array("i"), []
    for _ in range(count):
        for descriptor in os.pipe():
            kept.callback(os.close, descriptor)
        passed.append(descriptor)
        inodes.append(os.fstat(descriptor).st_ino)
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, passed)] if count else []
    assert end.sendmsg([data], rights, flags) == len(data)
    return inodes


def inodes_of(descriptors: list[int]) -> list[int]:
    inodes = [os.fstat(descriptor).st_ino for descriptor in descriptors]
    for descriptor in descriptors:
        os.close(descriptor)
    return inodes


@pytest.mark.parametrize("sends", SENDS)
@pytest.mark.parametrize("received", ["at once", "as it comes"])
async def test_each_request_has_its_own_descriptors_and_no_others(
    connection: Connection,
    ends: tuple[socket.socket, socket.socket],
    nursery: trio.Nursery,
    sends: str,
    received: str,
) -> None:
    fds = connection.keep_descriptors()
    pieces, expected = SENDS[sends]
    taken: dict[int, list[int]] = {}

    async def receive() -> None:
        for _ in expected:
            request = await connection.receive()
            assert request is not None
            taken[request.msgid] = inodes_of(fds.take())
            connection.drop_descriptors()

    sent: list[int] = []
    with ExitStack() as kept:
        receiving = Running(nursery, receive) if received == "as it comes" else None
        for data, count in pieces:
            sent += send(ends[1], data, int(count), kept)
            if receiving is not None:
                await wait_all_tasks_blocked()
        await (receiving or Running(nursery, receive)).result()
    assert {msgid: len(inodes) for msgid, inodes in taken.items()} == expected
    assert [inode for inodes in taken.values() for inode in inodes] == sent


@pytest.mark.parametrize("at", [0, 1, len(FIRST) - 1, len(FIRST), len(FIRST) + 1])
async def test_a_descriptor_of_an_urgent_byte_comes_with_the_request_of_that_byte(
    connection: Connection, ends: tuple[socket.socket, socket.socket], at: int
) -> None:
    """MSG_OOB: a read, and a look, end before the byte that is urgent."""
    fds = connection.keep_descriptors()
    stream = FIRST + SECOND
    counts = []
    with ExitStack() as kept:
        if at:
            ends[1].send(stream[:at])
        send(ends[1], stream[at : at + 1], 1, kept, socket.MSG_OOB)
        ends[1].send(stream[at + 1 :])
        for msgid in (1, 2):
            assert await msgids(connection, 1) == [msgid]
            counts.append(len(inodes_of(fds.take())))
            connection.drop_descriptors()
    assert counts == ([1, 0] if at < len(FIRST) else [0, 1])


# ------------------------------------------------ a long queue


class CountingLooks(socket.socket):
    looks = 0

    def recv(self, size: int, flags: int = 0) -> bytes:
        self.looks += bool(flags & socket.MSG_PEEK)
        return super().recv(size, flags)


class Reading:
    """A reader of the daemon's end, whose looks are counted."""

    def __init__(self, source: CountingLooks) -> None:
        source.setblocking(False)
        self._source = source
        self._reader = RequestReader(source)
        self._receiver = rpc.Receiver({rpc.REQUEST})
        self._fds = ReceivedFds(Tenants(Limits).of(0).closer)

    def read_all(self) -> tuple[int, int]:
        """How many requests were unread, and how many looks it took to read them."""
        requests, self._source.looks = 0, 0
        with suppress(BlockingIOError):
            while True:
                requests += self._reader.read(self._receiver, self._fds) is not None
        return requests, self._source.looks


@pytest.fixture
def reader(ends: tuple[socket.socket, socket.socket]) -> Iterator[Reading]:
    with CountingLooks(fileno=os.dup(ends[0].fileno())) as source:
        yield Reading(source)


@pytest.mark.parametrize("reading", ["looks"], indirect=True)
def test_after_a_slow_look_no_look_is_made_until_all_is_read(
    ends: tuple[socket.socket, socket.socket], reader: Reading, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(request_reader, "LONG_LOOK_NS", -1)
    for _ in range(2):
        ends[1].send(FIRST * 100)
        assert reader.read_all() == (100, 1)


@pytest.mark.parametrize("reading", ["looks"], indirect=True)
def test_where_much_is_unread_no_look_is_made_until_all_is_read(
    ends: tuple[socket.socket, socket.socket], reader: Reading, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each byte may be a send(2) of its own, and a look would go through all of them."""
    monkeypatch.setattr(request_reader, "LONG_LOOK_NS", 1 << 60)
    monkeypatch.setattr(request_reader, "SHORT_PAUSE_NS", -1)
    fitting = LOOK_LIMIT // len(FIRST)
    for requests, looks in ((fitting + 1, 0), (fitting, fitting + 1), (fitting + 1, 0)):
        ends[1].send(FIRST * requests)
        assert reader.read_all() == (requests, looks)


@pytest.mark.parametrize("reading", ["looks"], indirect=True)
def test_right_after_a_look_the_next_is_made_without_asking_how_much_is_unread(
    ends: tuple[socket.socket, socket.socket], reader: Reading, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Little can have been sent since."""
    monkeypatch.setattr(request_reader, "LONG_LOOK_NS", 1 << 60)
    monkeypatch.setattr(request_reader, "SHORT_PAUSE_NS", 1 << 62)
    requests = LOOK_LIMIT // len(FIRST) + 1
    ends[1].send(FIRST * requests)
    assert reader.read_all() == (requests, requests + 1)


@pytest.mark.parametrize(("unread", "in_thread"), [(LOOK_LIMIT, 0), (LOOK_LIMIT + 1, 1)])
async def test_closing_leaves_much_that_is_unread_to_a_thread(
    connection: Connection, ends: tuple[socket.socket, socket.socket], unread: int, in_thread: int
) -> None:
    ends[1].send(bytes(unread))
    connection.refuse(WireError(errno.EPROTO, "no"))
    connection.close()
    assert connection.tenant.unclosed.count == in_thread
    assert (await RawPeer.of(ends[1]).last_words()).number == errno.EPROTO
    eventually(lambda: connection.tenant.unclosed.count, 0)


# ------------------------------------------------ while an answer is awaited


async def test_a_second_request_does_not_end_the_wait_of_the_first(
    connection: Connection, ends: tuple[socket.socket, socket.socket], nursery: trio.Nursery
) -> None:
    finish = trio.Event()
    answering = Running(nursery, connection.answer_watched, finish.wait())
    await wait_all_tasks_blocked()
    for part in pairwise((0, 3, len(SECOND))):
        ends[1].send(SECOND[slice(*part)])
        await wait_all_tasks_blocked()
    finish.set()
    await answering.result()
    assert await msgids(connection, 1) == [2]


@pytest.mark.parametrize("leave", [socket.socket.close, lambda end: end.shutdown(socket.SHUT_WR)])
@pytest.mark.parametrize("more", [b"", SECOND[:1], SECOND], ids=["nothing", "a part", "a request"])
async def test_a_peer_that_leaves_ends_the_wait_whatever_it_has_sent_before(
    connection: Connection,
    ends: tuple[socket.socket, socket.socket],
    nursery: trio.Nursery,
    leave: object,
    more: bytes,
) -> None:
    answering = Running(nursery, connection.answer_watched, waiting_for_ever())
    await wait_all_tasks_blocked()
    ends[1].send(more)
    await wait_all_tasks_blocked()
    leave(ends[1])  # type: ignore[operator] # one of two functions
    with pytest.raises(ConnectionGone):
        await answering.result()


async def test_requests_before_a_half_close_are_received_and_then_the_end(
    connection: Connection, ends: tuple[socket.socket, socket.socket]
) -> None:
    ends[1].send(FIRST + SECOND + THIRD[:4])
    ends[1].shutdown(socket.SHUT_WR)
    assert await msgids(connection, 2) == [1, 2]
    assert await connection.receive() is None


async def blocked_answer(connection: Connection, nursery: trio.Nursery) -> Running[None]:
    """An answer that waits for a peer which does not read."""
    while True:
        answering = Running(nursery, connection.answer, rpc.encode_result(1, bytes(60_000)))
        await wait_all_tasks_blocked()
        if not answering.done:
            return answering


async def test_an_unread_answer_waits_for_ever_for_a_peer_that_only_sends_requests(
    connection: Connection, ends: tuple[socket.socket, socket.socket], nursery: trio.Nursery
) -> None:
    answering = await blocked_answer(connection, nursery)
    ends[1].send(FIRST)
    await trio.sleep(10 * REST_SECONDS)
    assert not answering.done
    peer = RawPeer.of(ends[1])
    while not answering.done:
        assert (await peer.response()).result == bytes(60_000)
    await answering.result()
    assert await msgids(connection, 1) == [1]


@pytest.mark.parametrize("before", [b"", FIRST, FIRST * 5000], ids=["first", "behind", "far behind"])
async def test_a_peer_that_leaves_its_own_end_unread_as_its_answers_is_noticed_in_time(
    connection: Connection,
    ends: tuple[socket.socket, socket.socket],
    nursery: trio.Nursery,
    before: bytes,
) -> None:
    """The connection stays open for as long as that end is unread."""
    answering = await blocked_answer(connection, nursery)
    ends[1].send(before)
    socket.send_fds(ends[1], [FIRST], [ends[1].fileno()])
    ends[1].close()
    await trio.sleep(REST_SECONDS - 1)
    assert not answering.done
    await trio.sleep(1.1)
    with pytest.raises(ConnectionGone, match="reads no answers"):
        await answering.result()


async def test_a_peer_that_reads_no_answers_may_not_leave_too_much_to_look_at(
    connection: Connection, ends: tuple[socket.socket, socket.socket], nursery: trio.Nursery
) -> None:
    answering = await blocked_answer(connection, nursery)
    ends[1].send(bytes(LOOK_LIMIT))
    await trio.sleep(2 * REST_SECONDS)
    assert not answering.done
    ends[1].send(b"\0")
    await trio.sleep(REST_SECONDS)
    with pytest.raises(ConnectionGone, match="reads no answers"):
        await answering.result()


async def test_a_look_for_unread_descriptors_takes_none(
    connection: Connection, ends: tuple[socket.socket, socket.socket]
) -> None:
    assert not may_bring_descriptors(ends[0])
    ends[1].send(FIRST)
    assert not may_bring_descriptors(ends[0])
    fds = connection.keep_descriptors()
    with ExitStack() as kept:
        inodes = send(ends[1], SECOND, 1, kept)
        assert may_bring_descriptors(ends[0])
        await msgids(connection, 2)
        assert inodes_of(fds.take()) == inodes


async def test_a_full_uid_is_refused_before_it_is_sent_more(
    connection: Connection, ends: tuple[socket.socket, socket.socket]
) -> None:
    connection.tenant.closer.hold(connection.tenant._limits().unclosed_descriptors_per_uid)
    with ExitStack() as kept:
        send(ends[1], FIRST, 1, kept)
        with pytest.raises(ProtocolViolation) as violation:
            await connection.receive()
    assert violation.value.number == errno.ENOSPC
