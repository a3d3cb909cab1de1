"""One connection over a real socket pair: requests in, answers out, one at a time."""

from __future__ import annotations

import array
import errno
import fcntl
import os
import select
import socket
import struct
import termios
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, suppress

import msgspec
import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from fakes.eventually import eventually
from fakes.others import Others
from fakes.raw_peer import RawPeer
from fakes.rude_peers import slow_to_close
from fakes.running import Running
from fakes.used_up_time import time_used_up_every
from intercept_protocol import rpc
from intercept_protocol.errors import ProtocolViolation, WireError
from intercept_protocol.messages import PIECES_LIMIT, MapGpa, MapGpas, MappingPage, MappingView
from interceptd.config.schema import Limits
from interceptd.connections.connection import (
    RECEIVE_BYTES,
    REST_SECONDS,
    Connection,
    ConnectionGone,
)
from interceptd.connections.fairness import ALONE, TURN
from interceptd.connections.hangup_watch import HangupWatch
from interceptd.connections.request_reader import STEPS
from interceptd.connections.tenants import BURST_SECONDS, Tenants
from interceptd.memory_budget import UNREAD_ANSWERS, UNREAD_REQUESTS, Cost

REQUEST = rpc.encode_request(1, "statistics", [{}])


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield ours, theirs


@pytest.fixture
async def connection(ends: tuple[socket.socket, socket.socket], nursery: trio.Nursery) -> Connection:
    watch = HangupWatch()
    nursery.start_soon(watch.run)
    return Connection(ends[0], Tenants(Limits), watch)


@pytest.fixture
async def peer(ends: tuple[socket.socket, socket.socket]) -> RawPeer:
    return RawPeer.of(ends[1])


async def waiting_for_ever() -> bytes:
    await trio.sleep_forever()


async def test_a_request_in_pieces_is_received_whole(connection: Connection, peer: RawPeer) -> None:
    await peer.send(REQUEST[:5])
    async with trio.open_nursery() as nursery:
        received = Running(nursery, connection.receive)
        await wait_all_tasks_blocked()
        await peer.send(REQUEST[5:])
        assert await received.result() == rpc.Request(1, "statistics", [{}])


async def test_a_peer_that_closes_between_requests_is_the_end(connection: Connection, peer: RawPeer) -> None:
    peer.close()
    assert await connection.receive() is None


async def test_a_request_whose_turn_was_cancelled_is_received_next(
    ends: tuple[socket.socket, socket.socket], peer: RawPeer
) -> None:
    connection = Connection(ends[0], Tenants(lambda: Limits(control_requests_per_second=1)), HangupWatch())
    await connection.tenant.throttle()
    await peer.send(REQUEST)
    with trio.move_on_after(0.5) as scope:
        await connection.receive()
    assert scope.cancelled_caught
    assert await connection.receive() == rpc.Request(1, "statistics", [{}])


async def test_a_second_request_is_a_violation_where_pipelining_is_forbidden(
    connection: Connection, peer: RawPeer, nursery: trio.Nursery
) -> None:
    connection.forbid_pipelining()
    answering = Running(nursery, connection.answer_watched, waiting_for_ever())
    await wait_all_tasks_blocked()
    await peer.send(REQUEST)
    with pytest.raises(ProtocolViolation, match="EPROTO: a second request was sent before the answer"):
        await answering.result()


async def test_a_second_request_that_is_here_already_is_a_violation_once_pipelining_is_forbidden(
    connection: Connection, peer: RawPeer
) -> None:
    await peer.send(REQUEST + REQUEST[:1])
    assert await connection.receive() == rpc.Request(1, "statistics", [{}])
    with pytest.raises(ProtocolViolation, match="EPROTO: a second request was sent before the answer"):
        connection.forbid_pipelining()


async def test_a_second_intercept_behind_one_in_an_unusual_format_is_a_violation(
    connection: Connection, peer: RawPeer
) -> None:
    connection.forbid_pipelining()
    await peer.send(REQUEST + REQUEST[:1])
    with pytest.raises(ProtocolViolation, match="EPROTO: a second request was sent before the answer"):
        await connection.receive_whole(lambda _: None)


async def test_a_peer_that_closes_while_its_request_waits_ends_the_wait(
    connection: Connection, peer: RawPeer, nursery: trio.Nursery
) -> None:
    answering = Running(nursery, connection.answer_watched, waiting_for_ever())
    await wait_all_tasks_blocked()
    peer.close()
    with pytest.raises(ConnectionGone):
        await answering.result()


async def test_a_peer_that_closes_ends_no_wait_but_its_own(nursery: trio.Nursery) -> None:
    watch = HangupWatch()
    nursery.start_soon(watch.run)
    tenants, pairs = (
        Tenants(Limits),
        [socket.socketpair() for _ in range(3)],
    )
    connections = [Connection(ours, tenants, watch) for ours, _ in pairs]
    waits = [Running(nursery, each.answer_watched, waiting_for_ever()) for each in connections]
    await wait_all_tasks_blocked()
    pairs[1][1].close()
    with pytest.raises(ConnectionGone):
        await waits[1].result()
    await wait_all_tasks_blocked()
    assert [wait.done for wait in waits] == [False, True, False]
    for (_, theirs), each in zip(pairs, connections, strict=True):
        theirs.close()
        each.close()


async def test_a_peer_that_leaves_during_a_shielded_answer_costs_one_check(
    connection: Connection, peer: RawPeer, nursery: trio.Nursery
) -> None:
    """The socket stays readable: a level-triggered watch would spin."""
    finish = trio.Event()

    async def answer() -> bytes:
        with trio.CancelScope(shield=True):
            await finish.wait()
        return b"there"

    answering = Running(nursery, connection.answer_watched, answer())
    await wait_all_tasks_blocked()
    peer.close()
    await wait_all_tasks_blocked()
    finish.set()
    assert await answering.result() == b"there"


async def test_an_answer_that_needs_no_wait_is_given(connection: Connection) -> None:
    async def answer() -> bytes:
        return b"there"

    assert await connection.answer_watched(answer()) == b"there"


async def test_an_error_in_the_answer_propagates_unchanged(connection: Connection) -> None:
    async def answer() -> bytes:
        raise WireError(errno.ENOENT, "not here")

    with pytest.raises(WireError, match="ENOENT: not here"):
        await connection.answer_watched(answer())


async def test_a_wait_is_cancelled_from_outside_as_any_other(
    connection: Connection, nursery: trio.Nursery
) -> None:
    answering = Running(nursery, connection.answer_watched, waiting_for_ever())
    await wait_all_tasks_blocked()
    assert await answering.cancel()


async def test_a_send_to_a_peer_that_does_not_read_waits_and_then_arrives_whole(
    connection: Connection, peer: RawPeer, nursery: trio.Nursery
) -> None:
    result = bytes(60_000)
    sent = [Running(nursery, connection.send, rpc.encode_result(1, result))]
    while sent[-1].done or len(sent) < 2:
        sent.append(Running(nursery, connection.send, rpc.encode_result(1, result)))
        await wait_all_tasks_blocked()
    received = [await peer.response() for _ in sent]
    assert {response.result for response in received} == {result}


async def test_a_send_to_a_peer_that_is_gone_says_so(connection: Connection, peer: RawPeer) -> None:
    peer.close()
    with pytest.raises(ConnectionGone):
        await connection.send(REQUEST)


async def blocked_answer(connection: Connection, nursery: trio.Nursery) -> Running[None]:
    """An answer that waits for a peer which does not read, though all before it were sent."""
    while True:
        answering = Running(nursery, connection.answer, rpc.encode_result(1, bytes(60_000)))
        await wait_all_tasks_blocked()
        if not answering.done:
            return answering


async def test_an_unread_answer_is_abandoned_when_a_peer_sends_that_may_not(
    connection: Connection, peer: RawPeer, nursery: trio.Nursery
) -> None:
    connection.forbid_pipelining()
    answering = await blocked_answer(connection, nursery)
    await peer.send(REQUEST[:1])
    with pytest.raises(ProtocolViolation, match="EPROTO: a second request was sent before the answer"):
        await answering.result()


async def test_an_unread_answer_is_abandoned_when_its_peer_leaves(
    connection: Connection, peer: RawPeer, nursery: trio.Nursery
) -> None:
    answering = await blocked_answer(connection, nursery)
    peer.close()
    with pytest.raises(ConnectionGone):
        await answering.result()


async def test_an_answer_that_is_read_late_arrives_whole(
    connection: Connection, peer: RawPeer, nursery: trio.Nursery
) -> None:
    answering = await blocked_answer(connection, nursery)
    while not answering.done:
        assert (await peer.response()).result == bytes(60_000)
    await answering.result()


# ------------------------------------------------ descriptors of half a request


def send_descriptor(end: socket.socket, data: bytes) -> socket.socket:
    """Send `data` with one end of a new pair; the other tells when all copies of that are closed."""
    ours, theirs = socket.socketpair()
    with theirs:
        socket.send_fds(end, [data], [theirs.fileno()])
    ours.settimeout(10)
    return ours


async def test_the_descriptors_of_half_a_request_are_closed_in_time_and_their_request_is_refused(
    connection: Connection, ends: tuple[socket.socket, socket.socket], nursery: trio.Nursery
) -> None:
    """However the rest comes: a byte now and then, with another descriptor, does not make it longer."""
    fds = connection.keep_descriptors()
    received = Running(nursery, connection.receive)
    with send_descriptor(ends[1], REQUEST[:1]) as first:
        await trio.sleep(REST_SECONDS - 1)
        with send_descriptor(ends[1], REQUEST[1:2]) as second:
            await trio.sleep(0.9)
            assert select.select([first, second], [], [], 0)[0] == [], "one is closed already"
            await trio.sleep(0.2)
            assert (first.recv(1), second.recv(1)) == (b"", b"")
    ends[1].send(REQUEST[2:])
    assert await received.result() == rpc.Request(1, "statistics", [{}])
    with pytest.raises(WireError, match="ETIMEDOUT: the rest of the request did not follow"):
        fds.take()


async def test_the_next_request_has_the_whole_time_for_its_descriptors_again(
    connection: Connection, ends: tuple[socket.socket, socket.socket], nursery: trio.Nursery
) -> None:
    fds = connection.keep_descriptors()
    for _ in range(2):
        received = Running(nursery, connection.receive)
        with send_descriptor(ends[1], REQUEST[:1]) as ours:
            await trio.sleep(REST_SECONDS - 1)
            ends[1].send(REQUEST[1:])
            await received.result()
            (taken,) = fds.take()
            os.close(taken)
            connection.drop_descriptors()
            assert ours.recv(1) == b""


async def test_a_rest_that_came_while_the_daemon_stood_still_was_in_time(
    connection: Connection, ends: tuple[socket.socket, socket.socket], nursery: trio.Nursery
) -> None:
    """Stopped by a signal, a debugger or a suspended machine, we have not looked at what was there."""
    fds = connection.keep_descriptors()
    received = Running(nursery, connection.receive)
    with send_descriptor(ends[1], REQUEST[:1]):
        await wait_all_tasks_blocked()
        ends[1].send(REQUEST[1:])
        clock = trio.lowlevel.current_clock()
        assert isinstance(clock, MockClock)
        clock.jump(2 * REST_SECONDS)
        assert await received.result() == rpc.Request(1, "statistics", [{}])
        (taken,) = fds.take()
        os.close(taken)


async def test_a_peer_that_sends_its_socket_and_half_a_request_is_noticed_in_time(
    connection: Connection, ends: tuple[socket.socket, socket.socket], nursery: trio.Nursery
) -> None:
    """Who holds a descriptor of the peer's end holds the connection open against himself."""
    connection.keep_descriptors()
    received = Running(nursery, connection.receive)
    socket.send_fds(ends[1], [REQUEST[:1]], [ends[1].fileno()])
    ends[1].close()
    await trio.sleep(REST_SECONDS + 0.1)
    select.select([ends[0]], [], [], 10)  # a thread closes it, outside the mock clock
    assert await received.result() is None


async def test_an_intercept_keeps_the_pace_of_requests_only_if_descriptors_come_along(
    ends: tuple[socket.socket, socket.socket],
) -> None:
    """None needs any, and closing them takes a thread."""
    connection = Connection(ends[0], Tenants(lambda: Limits(control_requests_per_second=1)), HangupWatch())
    began = trio.current_time()
    for _ in range(50):
        ends[1].send(b"intercept")
        assert await connection.receive_whole(bytes) == b"intercept"
    assert trio.current_time() == began
    for _ in range(3):
        send_descriptor(ends[1], b"intercept").close()
        assert await connection.receive_whole(bytes) == b"intercept"
    paced = began + 6 - BURST_SECONDS  # three intercepts, three descriptors
    assert trio.current_time() == pytest.approx(paced)
    ends[1].send(b"intercept")
    assert await connection.receive_whole(bytes) == b"intercept"
    assert trio.current_time() == pytest.approx(paced)


async def test_each_descriptor_costs_as_much_as_a_request(
    ends: tuple[socket.socket, socket.socket],
) -> None:
    connection = Connection(ends[0], Tenants(lambda: Limits(control_requests_per_second=1)), HangupWatch())
    began = trio.current_time()
    socket.send_fds(ends[1], [REQUEST], [ends[1].fileno()] * 2)
    assert await connection.receive() == rpc.Request(1, "statistics", [{}])
    assert trio.current_time() == pytest.approx(began + 3 - BURST_SECONDS)


@pytest.mark.parametrize(
    ("lists", "requests"),
    [([], 1), ([15], 1), ([16], 2), ([8, 8], 2), ([31], 2), ([128, 128], 17)],
    ids=str,
)
async def test_the_elements_of_a_requests_lists_cost_as_much_as_a_request_for_every_16(
    ends: tuple[socket.socket, socket.socket], lists: list[int], requests: int
) -> None:
    """Before it is answered, so that who sends the longest lists is read the least often."""
    connection = Connection(ends[0], Tenants(lambda: Limits(control_requests_per_second=1)), HangupWatch())
    connection.expect_long_requests()
    fields: dict[str, object] = {f"list {n}": [0] * length for n, length in enumerate(lists)}
    began = trio.current_time()
    ends[1].send(rpc.encode_request(1, "many", [fields | {"text": "x" * 64}]))
    assert await connection.receive() == rpc.Request(1, "many", [fields | {"text": "x" * 64}])
    assert trio.current_time() == pytest.approx(began + requests - BURST_SECONDS)


async def test_params_that_are_no_map_cost_one_request(ends: tuple[socket.socket, socket.socket]) -> None:
    connection = Connection(ends[0], Tenants(lambda: Limits(control_requests_per_second=1)), HangupWatch())
    began = trio.current_time()
    ends[1].send(rpc.encode_request(1, "many", [[0] * 32, 1]))
    assert await connection.receive() == rpc.Request(1, "many", [[0] * 32, 1])
    assert trio.current_time() == pytest.approx(began + 1 - BURST_SECONDS)


async def test_the_descriptor_of_an_urgent_byte_is_received_with_it(
    connection: Connection, ends: tuple[socket.socket, socket.socket]
) -> None:
    """The kernel would skip the byte (MSG_OOB), and close the descriptor in the thread that reads past it."""
    fds = connection.keep_descriptors()
    ours, theirs = socket.socketpair()
    with ours:
        passed = array.array("i", [theirs.detach()])
        rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, passed)
        ends[1].sendmsg([REQUEST[:1]], [rights], socket.MSG_OOB)
        os.close(passed[0])
        ends[1].send(REQUEST[1:])
        assert await connection.receive() == rpc.Request(1, "statistics", [{}])
        (taken,) = fds.take()
        os.close(taken)
        assert ours.recv(1) == b""


@pytest.mark.parametrize("before", [b"", REQUEST])
async def test_closing_closes_unread_descriptors_in_a_thread(
    connection: Connection, ends: tuple[socket.socket, socket.socket], before: bytes
) -> None:
    """The kernel would close them in the thread that closes the connection, however long it takes."""
    with ExitStack() as peers:
        ends[1].send(before)
        with slow_to_close(peers) as slow:
            socket.send_fds(ends[1], [b"unread"], [slow.fileno()])
        connection.refuse(WireError(errno.EPROTO, "no"))
        connection.close()
        assert connection.tenant.unclosed.count == 1
        assert ends[1].recv(4096)
        assert ends[1].recv(1, socket.MSG_DONTWAIT) == b"", "its peer need not wait for the thread"
    eventually(lambda: connection.tenant.unclosed.count, 0)


async def test_closing_wakes_a_waiting_receiver(connection: Connection, nursery: trio.Nursery) -> None:
    received = Running(nursery, connection.receive)
    await wait_all_tasks_blocked()
    connection.close()
    with pytest.raises(ConnectionGone):
        await received.result()
    connection.close()


async def test_refuse_reaches_a_peer_that_has_said_more_than_was_read(
    connection: Connection, peer: RawPeer
) -> None:
    """Closed with unread bytes, the socket would be reset, and the peer would not find our error."""
    await peer.send(REQUEST * 500)
    connection.refuse(WireError(errno.EPROTO, "no"))
    connection.close()
    assert (await peer.last_words()).number == errno.EPROTO


async def test_refuse_does_not_wait_for_a_peer_that_does_not_read(
    connection: Connection, ends: tuple[socket.socket, socket.socket]
) -> None:
    ends[0].setblocking(False)
    with suppress(BlockingIOError):
        while True:
            ends[0].send(bytes(60_000))
    with trio.testing.assert_no_checkpoints():
        connection.refuse(WireError(errno.EPROTO, "no"))


@pytest.mark.parametrize(
    ("elements", "pieces"),
    [([1 << 40] * 1700, 1700 * 9 // RECEIVE_BYTES), (["x" * 300] * 200, 200 // STEPS)],
    ids=["by looks", "in steps"],
)
async def test_a_request_of_many_elements_is_scanned_in_pieces_that_yield(
    connection: Connection,
    ends: tuple[socket.socket, socket.socket],
    nursery: trio.Nursery,
    elements: list[object],
    pieces: int,
) -> None:
    """All of it is here, so that nothing else would park the task."""
    connection.expect_long_requests()
    request = rpc.encode_request(1, "many", [{"list": elements}])
    ends[1].setblocking(False)
    assert ends[1].send(request) == len(request)
    others = Others(nursery)
    assert await connection.receive() is not None
    assert others.turns >= pieces - 1


@pytest.mark.parametrize(
    ("elements", "step"),
    [(15, trio.testing.assert_no_checkpoints), (16, trio.testing.assert_checkpoints)],
    ids=["short", "long"],
)
async def test_a_request_with_a_long_list_is_carried_out_in_a_step_of_its_own_where_time_is_used_up(
    connection: Connection, peer: RawPeer, elements: int, step: Callable[[], AbstractContextManager[None]]
) -> None:
    await peer.send(rpc.encode_request(1, "many", [{"list": [0] * elements}]))
    with time_used_up_every(1), step():
        request = await connection.receive()
    assert request == rpc.Request(1, "many", [{"list": [0] * elements}])


async def test_a_peer_that_never_pauses_does_not_starve_others(
    connection: Connection, peer: RawPeer, nursery: trio.Nursery
) -> None:
    """Its socket is never found empty, so nothing else would park the task."""
    others = Others(nursery)
    for _ in range(4 * TURN):
        peer.send_now(REQUEST)
        await connection.receive()
    assert others.turns >= 3


async def test_a_vp_that_never_pauses_does_not_starve_others(
    connection: Connection, peer: RawPeer, nursery: trio.Nursery
) -> None:
    for _ in range(ALONE):
        peer.send_now(REQUEST)
        await connection.receive_whole(bytes)
    others = Others(nursery)
    for _ in range(4 * TURN):
        peer.send_now(REQUEST)
        await connection.receive_whole(bytes)
    assert 3 <= others.turns <= 5


async def test_vps_that_never_pause_let_others_have_a_turn_at_every_message(
    connection: Connection, peer: RawPeer, nursery: trio.Nursery
) -> None:
    """One that took eight in a row would be eight times ahead of its neighbours."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        connections = (
            (connection, peer),
            (
                Connection(ours, Tenants(Limits), HangupWatch()),
                RawPeer.of(theirs),
            ),
        )
        for _ in range(ALONE):
            peer.send_now(REQUEST)
            await connection.receive_whole(bytes)
        others = Others(nursery)
        for _ in range(ALONE):
            for one, other_end in connections:
                other_end.send_now(REQUEST)
                await one.receive_whole(bytes)
    assert others.turns >= 2 * ALONE - 2, "the first one is alone yet, and trio draws who is first in a round"


# ------------------------------------------------ what lies unread


MOST = 2**64 - 1
LONGEST = {
    "expect_short_requests": rpc.encode_error(2**32 - 1, WireError(errno.EINVAL, "x" * 2000)),
    "expect_long_requests": rpc.encode_result(
        2**32 - 1,
        msgspec.to_builtins(
            MappingPage(
                mappings=[
                    MappingView(
                        start_gfn=MOST,
                        page_count=MOST,
                        start_uaddr=MOST,
                        frame=(f"file {0xFFF}:{0xFFFFF}:{MOST}", MOST),
                        access=7,
                    )
                ]
                * MappingPage.PAGE,
                more=True,
            )
        ),
    ),
    "expect_responses": rpc.encode_request(
        2**32 - 1,
        MapGpas.METHOD,
        [
            msgspec.to_builtins(
                MapGpas(
                    pieces=[
                        MapGpa(start_gfn=MOST, page_count=MOST, start_uaddr=MOST, access=7, start_pfn=MOST)
                    ]
                    * PIECES_LIMIT
                )
            )
        ],
    ),
}
"""Of what the daemon sends to such a peer."""
COUNTED = {
    "expect_short_requests": Cost.CONNECTION,
    "expect_long_requests": UNREAD_ANSWERS,
    "expect_responses": UNREAD_REQUESTS,
}


@pytest.mark.parametrize("kind", LONGEST)
@pytest.mark.parametrize("size", ["short", "longest"])
async def test_of_what_a_peer_does_not_read_little_takes_kernel_memory_and_is_cut_nowhere(
    connection: Connection, ends: tuple[socket.socket, socket.socket], kind: str, size: str
) -> None:
    getattr(connection, kind)()
    message = b"x" if size == "short" else LONGEST[kind]
    sent = []
    with suppress(BlockingIOError):
        while True:
            sent.append(ends[0].send(message))
    [taken] = struct.unpack("i", fcntl.ioctl(ends[0], termios.TIOCOUTQ, bytes(4)))
    assert set(sent) == {len(message)}
    assert len(sent) > 1
    assert taken <= COUNTED[kind]
