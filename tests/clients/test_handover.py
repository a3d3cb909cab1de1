"""Descriptors are sent with a request's first byte; a failure to send them loses nothing."""

from __future__ import annotations

import errno
import os
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from itertools import count
from pathlib import Path

import pytest
import trio

from fakes.eventually import PATIENCE
from fakes.scripted_daemon import Answer, Hear, Look, Refuse, ScriptedDaemon, Step, hello
from intercept_client import BlockingVmm, ClientMisuse, TrioVmm, _own_memory
from intercept_client._blocking_connection import BlockingConnection
from intercept_client._exchange import call_exchange
from intercept_client._trio_connection import TrioConnection
from intercept_client.memory import OwnMemory, Watch, own_memory
from intercept_protocol import rpc
from intercept_protocol.errors import WireError
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


# ------------------------------------------------ once more (P-19)

AGAIN = WireError(errno.EAGAIN, "the daemon was restarted")


def attach_blocking(path: Path, own: OwnMemory) -> None:
    with BlockingVmm.open(path, timeout=PATIENCE) as vmm:
        vmm.attach_memory(own, promise_begin_end=True)


def attach_trio(path: Path, own: OwnMemory) -> None:
    async def attach() -> None:
        with trio.fail_after(PATIENCE):
            async with TrioVmm.open(path) as vmm:
                await vmm.attach_memory(own, promise_begin_end=True)

    trio.run(attach)


shells = pytest.mark.parametrize("attach", [attach_blocking, attach_trio], ids=["blocking", "trio"])
Attach = Callable[[Path, OwnMemory], None]


@pytest.fixture
def numbered_userfaultfds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files in their place, by whose names a test tells one from the next."""
    numbers = count(1)
    monkeypatch.setattr(_own_memory, "open_userfaultfd", lambda: os.memfd_create(f"uffd-{next(numbers)}"))


@shells
@pytest.mark.usefixtures("numbered_userfaultfds")
def test_memory_is_handed_over_again_with_a_new_userfaultfd(socket_path: Path, attach: Attach) -> None:
    brought: list[list[str]] = []
    before = os.listdir("/proc/self/fd")
    with own_memory(Watch.REQUIRED) as own:

        def look() -> None:
            brought.append([os.readlink(f"/proc/self/fd/{descriptor}") for descriptor in own.descriptors])
            assert not any(map(os.get_inheritable, own.descriptors))

        refusal: list[Step] = [Hear(), Look(look), Refuse(AGAIN)]
        script = [*hello(), *refusal, *refusal, Hear(), Look(look), Answer()]
        with ScriptedDaemon(socket_path, (script,)) as daemon:
            attach(socket_path, own)
    assert daemon.heard[1:] == [("attach_memory", [{"promise_begin_end": True}])] * 3
    maps = [f"/proc/{os.getpid()}/{name}" for name in ("maps", "smaps")]
    assert brought == [[*maps, f"/memfd:uffd-{number} (deleted)"] for number in (1, 2, 3)]
    assert os.listdir("/proc/self/fd") == before


@shells
@pytest.mark.parametrize(("number", "times"), [(errno.EAGAIN, 3), (errno.EINVAL, 1)])
def test_a_refusal_that_stays_is_raised(socket_path: Path, attach: Attach, number: int, times: int) -> None:
    refusal: list[Step] = [Hear(), Refuse(WireError(number, "no"))]
    with (
        own_memory(Watch.NONE) as own,
        ScriptedDaemon(socket_path, ([*hello(), *refusal * times],)) as daemon,
        pytest.raises(WireError, match=errno.errorcode[number]),
    ):
        attach(socket_path, own)
    assert len(daemon.heard) == 1 + times
