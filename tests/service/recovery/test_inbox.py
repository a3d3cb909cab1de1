"""An inbox: whatever the kernel has handed out is there until it is answered, wherever the daemon dies.

A death is a second inbox over the same memory.
"""

from __future__ import annotations

import errno
import socket
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import pairwise

import msgpack
import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from fakes.running import Running
from intercept_protocol import messages, rpc
from intercept_protocol._announcement_codec import AnnouncementRequest
from intercept_protocol.errors import ProtocolViolation
from interceptd.config.schema import Limits
from interceptd.connections import request_reader
from interceptd.connections.connection import Connection
from interceptd.connections.hangup_watch import HangupWatch
from interceptd.connections.received_fds import ReceivedFds
from interceptd.connections.request_loop import serve_calls
from interceptd.connections.tenants import Tenants
from interceptd.ledger.inbox import (
    HYPERVISOR_INBOX,
    IDLE,
    INBOX_AREA,
    INBOXES,
    SMALL_INBOX,
    VMM_INBOX,
    Inbox,
    inbox_place,
)
from interceptd.ledger.journal import Journal
from interceptd.ledger.ledger import Ledger
from interceptd.ledger.records import Done, decode

INTERCEPT = rpc.encode_request(7, "intercept", [bytes(range(256))])
CALL = rpc.encode_request(8, "remove_region", [{"start_gfn": 1, "page_count": 2, "start_uaddr": 4096}])
NUMBERS = (VMM_INBOX, HYPERVISOR_INBOX, 2, INBOXES - 1)
MESSAGE_LIMIT = 1 << 16


@pytest.fixture(params=NUMBERS)
def memory(request: pytest.FixtureRequest) -> tuple[int, memoryview]:
    start, end = inbox_place(request.param)
    return request.param, memoryview(bytearray(end - start))


def new(memory: tuple[int, memoryview]) -> Inbox:
    inbox = Inbox(*memory)
    inbox.clear()
    return inbox


def successor(inbox: Inbox) -> Inbox:
    """Another daemon's view of the same inbox."""
    words, buffer = inbox._words, inbox._buffer
    copied = bytearray(words.tobytes() + buffer.tobytes())
    return Inbox(inbox.number, memoryview(copied))


def kernel_writes(inbox: Inbox, data: bytes, size: int = 4096) -> None:
    """What recvmsg_into does; then the daemon may die."""
    for space in inbox.space(size):
        space[: len(data)] = data


def received(inbox: Inbox, *pieces: bytes) -> None:
    for piece in pieces:
        kernel_writes(inbox, piece)
        assert inbox.received(len(piece)) == piece
        inbox.note(len(piece))


def pieces(message: bytes, size: int) -> list[bytes]:
    return [message[at : at + size] for at in range(0, len(message), size)]


def test_the_inboxes_lie_side_by_side_in_their_area() -> None:
    places = [inbox_place(number) for number in range(INBOXES)]
    assert places[0][0] == 0
    assert all(before[1] == after[0] for before, after in pairwise(places))
    assert 0 <= INBOX_AREA - places[-1][1] < SMALL_INBOX + 64
    assert all(start % 64 == 0 for start, _ in places), "whole cache lines"


def test_a_new_inbox_owes_nothing(memory: tuple[int, memoryview]) -> None:
    inbox = successor(new(memory))
    assert (inbox.take_over(), inbox.owes_hello, inbox.strikes) == (b"", False, 0)
    assert inbox.capacity == (MESSAGE_LIMIT if inbox.number < 2 else SMALL_INBOX)


def test_a_whole_request_that_nobody_noted_is_there(memory: tuple[int, memoryview]) -> None:
    """An intercept is never noted; of another the daemon died before it could."""
    for message in (INTERCEPT, CALL):
        inbox = new(memory)
        kernel_writes(inbox, message)
        assert successor(inbox).take_over() == message


def test_behind_a_short_request_an_older_and_longer_one_is_not_seen() -> None:
    inbox = new((2, memoryview(bytearray(64 + SMALL_INBOX))))
    kernel_writes(inbox, INTERCEPT)
    inbox.answered()
    kernel_writes(inbox, CALL)
    assert successor(inbox).take_over() == CALL
    inbox.note(len(CALL))
    assert successor(inbox).take_over() == CALL
    inbox.answered()
    kernel_writes(inbox, INTERCEPT)
    inbox.answered()
    received(inbox, CALL[:20])
    assert successor(inbox).take_over() == CALL[:20]


def test_what_an_answered_request_has_left_does_not_complete_a_part_of_the_next_one() -> None:
    inbox = new((2, memoryview(bytearray(64 + SMALL_INBOX))))
    kernel_writes(inbox, CALL)
    inbox.answered()
    inbox.expect_part()
    assert successor(inbox).take_over() == b""
    kernel_writes(inbox, CALL[:20])
    assert successor(inbox).take_over() == CALL[:20], "before it was noted"
    inbox.note(20)
    inbox.expect_part()
    assert successor(inbox).take_over() == CALL[:20], "and it is kept while more is expected"


def test_the_request_after_one_that_was_recorded_is_another(memory: tuple[int, memoryview]) -> None:
    """Its answer would else be that of the recorded one."""
    inbox = new(memory)
    kernel_writes(inbox, CALL)
    recorded = inbox.take_serial()
    before = successor(inbox)
    assert (before.take_over(), before.serial) == (CALL, recorded)
    inbox.answered()
    kernel_writes(inbox, CALL)
    after = successor(inbox)
    assert after.take_over() == CALL
    assert after.serial != recorded


@pytest.mark.parametrize("size", [1, 7, 100])
@pytest.mark.parametrize("message", [INTERCEPT, CALL])
def test_what_came_of_a_request_in_pieces_is_there(
    memory: tuple[int, memoryview], message: bytes, size: int
) -> None:
    """After each piece that was noted: no more and no less."""
    inbox = new(memory)
    so_far = b""
    for piece in pieces(message, size):
        received(inbox, piece)
        so_far += piece
        assert successor(inbox).take_over() == so_far


def test_a_piece_that_nobody_noted_is_there_behind_those_that_were(memory: tuple[int, memoryview]) -> None:
    inbox = new(memory)
    received(inbox, CALL[:20])
    kernel_writes(inbox, CALL[20:30])
    assert successor(inbox).take_over() == CALL[:30]
    inbox.note(10)
    kernel_writes(inbox, CALL[30:])
    assert successor(inbox).take_over() == CALL


@pytest.mark.parametrize("noted", [0, 3])
def test_the_last_byte_of_a_request_may_be_the_idle_one(memory: tuple[int, memoryview], noted: int) -> None:
    message = msgpack.packb([0, 1, "unmap", [{"page_count": 0x1C1}]])
    assert message[-1] == IDLE
    inbox = new(memory)
    if noted:
        received(inbox, message[:noted])
    kernel_writes(inbox, message[noted:])
    assert successor(inbox).take_over() == message


def test_a_string_that_is_not_whole_is_not_filled_up_with_idle_bytes(memory: tuple[int, memoryview]) -> None:
    """The bytes behind it would be as good as its own."""
    inbox = new(memory)
    received(inbox, INTERCEPT[:100])
    assert successor(inbox).take_over() == INTERCEPT[:100]


# ------------------------------------------------ answered


@pytest.mark.parametrize("message", [INTERCEPT, CALL])
def test_what_was_answered_is_not_owed_although_it_was_not_wiped(
    memory: tuple[int, memoryview], monkeypatch: pytest.MonkeyPatch, message: bytes
) -> None:
    inbox = new(memory)
    received(inbox, message)
    monkeypatch.setattr(Inbox, "_wipe", lambda *_: None)  # killed behind the first byte
    inbox.answered()
    monkeypatch.undo()
    inbox = successor(inbox)
    assert inbox.take_over() == b""
    assert bytes(inbox._buffer) == bytes([IDLE]) * inbox.capacity


def test_an_idle_byte_with_rubbish_behind_it_owes_nothing(memory: tuple[int, memoryview]) -> None:
    inbox = new(memory)
    inbox._buffer[1:300] = bytes(299)
    inbox._words[0] = 300
    assert successor(inbox).take_over() == b""


def test_after_an_answer_the_next_request_is_read_from_the_beginning(memory: tuple[int, memoryview]) -> None:
    inbox = new(memory)
    received(inbox, *pieces(CALL, 10))
    inbox.answered()
    received(inbox, INTERCEPT)
    assert successor(inbox).take_over() == INTERCEPT


# ------------------------------------------------ a successor


def test_a_successor_receives_the_rest_behind_what_was_there(memory: tuple[int, memoryview]) -> None:
    inbox = new(memory)
    received(inbox, CALL[:20])
    inbox = successor(inbox)
    assert inbox.take_over() == CALL[:20]
    received(inbox, CALL[20:])
    assert successor(inbox).take_over() == CALL
    inbox.answered()
    assert successor(inbox).take_over() == b""


@pytest.mark.parametrize("noted", [True, False])
def test_a_successor_that_dies_leaves_what_it_had_taken_over(
    memory: tuple[int, memoryview], *, noted: bool
) -> None:
    inbox = new(memory)
    kernel_writes(inbox, INTERCEPT)
    if noted:
        inbox.note(len(INTERCEPT))
    for strikes in range(1, 4):
        inbox = successor(inbox)
        assert inbox.take_over() == INTERCEPT
        inbox.strike()
        assert inbox.strikes == strikes
    inbox.answered()
    inbox = successor(inbox)
    assert (inbox.take_over(), inbox.strikes) == (b"", 0)


def test_a_hello_is_owed_until_it_is_answered(memory: tuple[int, memoryview]) -> None:
    inbox = new(memory)
    inbox.owe_hello()
    inbox = successor(inbox)
    assert (inbox.take_over(), inbox.owes_hello) == (b"", True)
    inbox = successor(inbox)
    assert inbox.owes_hello
    inbox.answered()
    assert not inbox.owes_hello
    assert not successor(inbox).owes_hello


# ------------------------------------------------ its end


def test_a_full_inbox_has_no_room(memory: tuple[int, memoryview]) -> None:
    inbox = new(memory)
    whole = bytes(inbox.capacity)
    received(inbox, *pieces(whole, 4096 if inbox.number < 2 else inbox.capacity))
    assert list(inbox.space(1)) == []
    assert successor(inbox).take_over() == whole


@contextmanager
def connected(inbox: Inbox) -> Iterator[tuple[Connection, socket.socket]]:
    ours, theirs = socket.socketpair()
    connection = Connection(ours, Tenants(Limits), HangupWatch())
    connection.use(inbox)
    with theirs:
        yield connection, theirs
    connection.close()


def string(length: int) -> bytes:
    """A request of so many bytes."""
    shorter = rpc.encode_request(1, "statistics", [{"x": "x" * 1000}])
    return rpc.encode_request(1, "statistics", [{"x": "x" * (1000 + length - len(shorter))}])


async def receive(connection: Connection) -> rpc.Request | AnnouncementRequest | None:
    return await connection.receive()


async def receive_whole(connection: Connection) -> rpc.Request | None:
    return await connection.receive_whole(lambda _: None)


@pytest.mark.parametrize("receive", [receive, receive_whole])
@pytest.mark.parametrize("first", [1, 600, SMALL_INBOX, SMALL_INBOX + 1])
async def test_a_request_that_an_inbox_cannot_hold_ends_the_connection(
    nursery: trio.Nursery, receive: Callable[[Connection], Awaitable[rpc.Request | None]], first: int
) -> None:
    with connected(new((2, memoryview(bytearray(64 + SMALL_INBOX))))) as (connection, theirs):
        connection.expect_short_requests()
        theirs.sendall(string(SMALL_INBOX))
        assert await receive(connection) is not None
        connection.mark_answered()
        longer = string(SMALL_INBOX + 1)
        theirs.sendall(longer[:first])
        receiving = Running(nursery, receive, connection)
        await wait_all_tasks_blocked()
        theirs.sendall(longer[first:])
        with pytest.raises(ProtocolViolation) as raised:
            await receiving.result()
    assert raised.value.number == errno.EMSGSIZE
    assert raised.value.details == {"limit": "request_bytes"}


@pytest.mark.parametrize("at", [1, 4, 20, 51])
async def test_of_a_notifiers_request_in_pieces_all_that_came_is_there(
    nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    """Over an older one. The daemon may die right after each read."""
    inbox = new((2, memoryview(bytearray(64 + SMALL_INBOX))))
    read = inbox.received
    there: list[bytes] = []

    def received(count: int) -> bytes:
        there.append(successor(inbox).take_over())
        return read(count)

    monkeypatch.setattr(Inbox, "received", lambda _, count: received(count))
    monkeypatch.setattr(request_reader, "LONG_LOOK_NS", 1 << 62)  # on a slow machine it would read in steps
    with connected(inbox) as (connection, theirs):
        connection.expect_short_requests()
        theirs.sendall(CALL)
        request = await connection.receive()
        await connection.answer(b"")
        theirs.sendall(CALL[:at])
        receiving = Running(nursery, connection.receive)
        await wait_all_tasks_blocked()
        theirs.sendall(CALL[at:])
        assert await receiving.result() == request
    assert there == [CALL, CALL[:at], CALL]


async def test_a_request_that_the_kernel_hands_out_in_pieces_is_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It may hand out less than a look has shown."""
    inbox = new((2, memoryview(bytearray(64 + SMALL_INBOX))))
    whole = ReceivedFds.receive

    def receive(fds: ReceivedFds, source: socket.socket, size: int, into: Inbox | None = None) -> bytes:
        return whole(fds, source, min(size, 10), into)

    monkeypatch.setattr(ReceivedFds, "receive", receive)
    with connected(inbox) as (connection, theirs):
        connection.expect_short_requests()
        theirs.sendall(CALL)
        assert await connection.receive() is not None
        assert successor(inbox).take_over() == CALL


async def test_each_recorded_call_of_a_notifier_has_a_serial_that_no_other_request_has(
    ledger: Ledger, nursery: trio.Nursery
) -> None:
    inbox = ledger.inbox(2)
    inbox.clear()
    journal = Journal(ledger, lambda _: None)
    end = rpc.encode_request(7, "invalidate_end", [{"start_uaddr": 0, "length": 4096}])
    with connected(inbox) as (connection, theirs):
        connection.expect_short_requests()
        calls = partial(serve_calls, connection, messages.NOTIFIER_METHODS, lambda _: None, journal=journal)
        serving = Running(nursery, calls)
        for _ in range(2):
            theirs.sendall(end)
            await wait_all_tasks_blocked()
        done = [decode(frame) for frame, _ in ledger.frames()]
        serials = [each.serial for each in done if isinstance(each, Done)]
        assert len({*serials, inbox.serial}) == 3
        await serving.cancel()


async def test_a_vmms_inbox_holds_the_longest_message() -> None:
    start, end = inbox_place(VMM_INBOX)
    inbox = new((VMM_INBOX, memoryview(bytearray(end - start))))
    with connected(inbox) as (connection, theirs):
        theirs.sendall(string(MESSAGE_LIMIT))
        assert await connection.receive() is not None
    assert successor(inbox).take_over() == string(MESSAGE_LIMIT)
