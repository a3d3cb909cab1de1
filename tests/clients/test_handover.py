"""Descriptors are sent with a request's first byte; a failure to send them loses nothing."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack

import pytest
import trio

from intercept_client import ClientMisuse
from intercept_client._blocking_connection import BlockingConnection
from intercept_client._exchange import call_exchange
from intercept_client._trio_connection import TrioConnection
from intercept_client.memory import Watch, own_memory
from intercept_protocol import rpc
from intercept_protocol.messages import AttachMemory, Kick

CALL = AttachMemory(promise_begin_end=True)


@pytest.fixture
def sockets() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield ours, theirs


class Peer:
    """Reads one request byte by byte, and answers it."""

    def __init__(self, sock: socket.socket, answers: int = 1) -> None:
        self.first_byte_brought: list[str] = []
        self.the_rest_brought = 0
        self._socket = sock
        self._answers = answers
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        for _ in range(self._answers):
            receiver = rpc.Receiver({rpc.REQUEST})
            data, descriptors, _, _ = socket.recv_fds(self._socket, 1, 10)
            for descriptor in descriptors:
                self.first_byte_brought.append(os.readlink(f"/proc/self/fd/{descriptor}"))
                os.close(descriptor)
            receiver.receive_data(data)
            while not isinstance(request := receiver.next_message(), rpc.Request):
                data, descriptors, _, _ = socket.recv_fds(self._socket, 1, 10)
                self.the_rest_brought += len(descriptors)
                receiver.receive_data(data)
            self._socket.sendall(rpc.encode_result(request.msgid, None))

    def done(self) -> tuple[list[str], int]:
        self._thread.join(10)
        return self.first_byte_brought, self.the_rest_brought


def test_a_blocking_call_brings_its_descriptors_with_the_first_byte(
    sockets: tuple[socket.socket, socket.socket],
) -> None:
    peer = Peer(sockets[1])
    with open("/dev/null", "rb") as null, open("/dev/zero", "rb") as zero:
        exchange = call_exchange(CALL, [null.fileno(), zero.fileno()])
        BlockingConnection(sockets[0]).run(exchange, None)
    assert peer.done() == (["/dev/null", "/dev/zero"], 0)


async def test_a_trio_call_brings_its_descriptors_with_the_first_byte(
    sockets: tuple[socket.socket, socket.socket],
) -> None:
    peer = Peer(sockets[1])
    sockets[0].setblocking(False)
    with ExitStack() as opened:
        null = os.open("/dev/null", os.O_RDONLY)
        opened.callback(os.close, null)
        await TrioConnection(trio.socket.from_stdlib_socket(sockets[0])).run(call_exchange(CALL, [null]))
    assert peer.done() == (["/dev/null"], 0)


def test_the_next_call_brings_nothing(sockets: tuple[socket.socket, socket.socket]) -> None:
    peer = Peer(sockets[1], answers=2)
    connection = BlockingConnection(sockets[0])
    with open("/dev/null", "rb") as null:
        connection.run(call_exchange(CALL, [null.fileno()]), None)
    connection.run(call_exchange(Kick(vp_index=0)), None)
    assert peer.done() == (["/dev/null"], 0)


def test_the_callers_descriptors_stay_open(sockets: tuple[socket.socket, socket.socket]) -> None:
    Peer(sockets[1])
    with open("/dev/null", "rb") as null:
        BlockingConnection(sockets[0]).run(call_exchange(CALL, [null.fileno()]), None)
        assert null.read() == b""


def test_a_descriptor_that_is_not_open_is_misuse_before_anything_is_sent() -> None:
    closed = os.open("/dev/null", os.O_RDONLY)
    os.close(closed)
    with pytest.raises(ClientMisuse, match=f"descriptor {closed} is not open"):
        call_exchange(CALL, [closed])


@pytest.mark.parametrize("descriptor", [-1, 1 << 40])
def test_an_invalid_descriptor_number_is_misuse(descriptor: int) -> None:
    with pytest.raises(ClientMisuse, match="is not open"):
        call_exchange(CALL, [descriptor])


def test_more_descriptors_than_a_message_brings_are_misuse() -> None:
    with open("/dev/null", "rb") as null, pytest.raises(ClientMisuse, match="254 descriptors"):
        call_exchange(CALL, [null.fileno()] * 254)


@pytest.mark.parametrize("error", [None, RuntimeError()])
def test_own_memory_leaves_no_copy_open_however_its_block_ends(error: Exception | None) -> None:
    before = os.listdir("/proc/self/fd")
    try:
        with own_memory(Watch.IF_POSSIBLE) as memory:
            links = [os.readlink(f"/proc/self/fd/{descriptor}") for descriptor in memory.descriptors]
            inherited = [os.get_inheritable(descriptor) for descriptor in memory.descriptors]
            if error is not None:
                raise error
    except RuntimeError:
        pass
    assert os.listdir("/proc/self/fd") == before
    assert links[:2] == [f"/proc/{os.getpid()}/maps", f"/proc/{os.getpid()}/smaps"]
    assert not any(inherited)
