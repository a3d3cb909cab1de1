"""What the blocking and the trio client do with a socket, in cases that a daemon cannot cause."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio
import trio.testing

from intercept_client import BlockingVmm, TrioVmm, _blocking_connection
from intercept_client._blocking_connection import BlockingConnection, deadline_in
from intercept_client._connecting import OPEN_SECONDS
from intercept_client._exchange import Progress, call_exchange
from intercept_client._trio_connection import TrioConnection
from intercept_protocol import rpc
from intercept_protocol.messages import Kick, VpSelection

KICK = Kick(vp_index=VpSelection.ALL)
DEAF_FOR = 0.05
"""Seconds that a test waits for room in a full socket."""

SocketPair = tuple[socket.socket, socket.socket]


@pytest.fixture
def sockets() -> Iterator[SocketPair]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield ours, theirs


@pytest.fixture
def full_sockets(sockets: SocketPair) -> SocketPair:
    """A pair whose first socket cannot take another byte."""
    ours, _ = sockets
    ours.setblocking(False)
    with pytest.raises(BlockingIOError):
        fill(ours)
    return sockets


def fill(sock: socket.socket) -> None:
    while True:
        sock.send(bytes(4096))


@pytest.fixture
def packet_sockets() -> Iterator[SocketPair]:
    """A pair that keeps apart what was sent by different system calls."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        yield ours, theirs


def is_a_whole_request(data: bytes) -> bool:
    receiver = rpc.Receiver({rpc.REQUEST})
    receiver.receive_data(data)
    return receiver.next_message() is not None


def test_a_blocking_request_is_one_system_call(packet_sockets: SocketPair) -> None:
    ours, theirs = packet_sockets
    theirs.send(rpc.encode_result(1, None))

    BlockingConnection(ours).run(call_exchange(KICK), None)

    assert is_a_whole_request(theirs.recv(4096))


async def test_a_trio_request_is_one_system_call(packet_sockets: SocketPair) -> None:
    ours, theirs = packet_sockets
    theirs.send(rpc.encode_result(1, None))

    await TrioConnection(trio.socket.from_stdlib_socket(ours)).run(call_exchange(KICK))

    assert is_a_whole_request(theirs.recv(4096))


async def test_a_trio_call_cancelled_while_the_socket_is_full_is_withdrawn(full_sockets: SocketPair) -> None:
    connection = TrioConnection(trio.socket.from_stdlib_socket(full_sockets[0]))
    exchange = call_exchange(KICK)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(connection.run, exchange)
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()

    assert exchange.progress is Progress.WITHDRAWN
    connection.close()


def test_a_blocking_call_timed_out_while_the_socket_is_full_is_withdrawn(full_sockets: SocketPair) -> None:
    connection, exchange = BlockingConnection(full_sockets[0]), call_exchange(KICK)

    with pytest.raises(TimeoutError):
        connection.run(exchange, deadline_in(DEAF_FOR))

    assert exchange.progress is Progress.WITHDRAWN


def test_a_blocking_call_without_a_deadline_waits_forever_after_one_with_a_deadline(
    sockets: SocketPair,
) -> None:
    ours, theirs = sockets
    connection = BlockingConnection(ours)
    theirs.sendall(rpc.encode_result(1, None))
    connection.run(call_exchange(KICK), deadline_in(10))
    theirs.sendall(rpc.encode_result(2, None))

    connection.run(call_exchange(KICK), None)

    assert ours.gettimeout() is None


# ------------------------------------------------ a daemon that accepts and says nothing


@pytest.fixture
def silent(tmp_path: Path) -> Iterator[Path]:
    """A socket that connects, and whose owner never answers."""
    path = tmp_path / "silent.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        yield path


def test_a_blocking_open_does_not_wait_for_ever(silent: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_blocking_connection, "OPEN_SECONDS", DEAF_FOR)
    with pytest.raises(TimeoutError, match="did not answer in time"):
        BlockingVmm.open(silent)


def test_the_open_timeout_of_a_blocking_client_is_not_that_of_its_calls(silent: Path) -> None:
    with pytest.raises(TimeoutError, match="did not answer in time"):
        BlockingVmm.open(silent, timeout=10 * OPEN_SECONDS, open_timeout=DEAF_FOR)


async def test_a_trio_open_does_not_wait_for_ever(
    silent: Path, autojump_clock: trio.testing.MockClock
) -> None:
    began = trio.current_time()
    with pytest.raises(TimeoutError, match="did not answer in time"):
        async with TrioVmm.open(silent):
            raise AssertionError("nobody has welcomed it")
    assert trio.current_time() - began == pytest.approx(OPEN_SECONDS)
    assert autojump_clock.rate == 0


async def test_a_trio_open_takes_as_long_as_its_caller_says(
    silent: Path, autojump_clock: trio.testing.MockClock
) -> None:
    began = trio.current_time()
    with pytest.raises(TimeoutError):
        async with TrioVmm.open(silent, open_timeout=2.0):
            raise AssertionError("nobody has welcomed it")
    assert trio.current_time() - began == pytest.approx(2.0)
    assert autojump_clock.rate == 0
