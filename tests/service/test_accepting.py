"""The accept loop: an error of one connection ends nothing else."""

from __future__ import annotations

import errno
import socket
from pathlib import Path

import pytest
import structlog.testing
import trio
import trio.testing

from interceptd.connections.accept import LEFT, NO_ROOM, Shortage, accept_forever


class Refusing(socket.socket):
    """The first accept fails, and takes the connection with it."""

    number = 0

    def accept(self) -> tuple[socket.socket, object]:
        accepted, address = super().accept()
        if self.number:
            number, self.number = self.number, 0
            accepted.close()
            raise OSError(number, "by order")
        return accepted, address


@pytest.mark.parametrize("number", sorted(LEFT | NO_ROOM))
async def test_a_connection_that_is_lost_in_accept_does_not_keep_the_next_one_out(
    number: int, tmp_path: Path
) -> None:
    served = trio.Event()

    async def serve(accepted: socket.socket) -> None:
        accepted.close()
        served.set()

    path = str(tmp_path / "door")
    with (
        Refusing(socket.AF_UNIX) as door,
        socket.socket(socket.AF_UNIX) as lost,
        socket.socket(socket.AF_UNIX) as next_one,
    ):
        door.number = number
        door.bind(path)
        door.listen()
        lost.connect(path)
        next_one.connect(path)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(accept_forever, door, serve, nursery, Shortage())
            await served.wait()
            nursery.cancel_scope.cancel()
    assert served.is_set()


async def test_a_listener_that_is_no_longer_a_socket_ends_the_loop(tmp_path: Path) -> None:
    path = str(tmp_path / "door")

    async def serve(_: socket.socket) -> None:
        raise AssertionError("no connection was accepted")

    with Refusing(socket.AF_UNIX) as door, socket.socket(socket.AF_UNIX) as lost:
        door.number = errno.EINVAL
        door.bind(path)
        door.listen()
        lost.connect(path)
        async with trio.open_nursery() as nursery:
            with pytest.raises(OSError, match="by order"):
                await accept_forever(door, serve, nursery, Shortage())


class Full(socket.socket):
    """Has no descriptor for the first `refusals` accepts."""

    refusals = 0

    def accept(self) -> tuple[socket.socket, object]:
        if self.refusals:
            self.refusals -= 1
            raise OSError(errno.EMFILE, "by order")
        return super().accept()


async def test_a_lasting_want_of_descriptors_is_one_line_that_names_who_has_most(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    served = trio.Event()

    async def serve(accepted: socket.socket) -> None:
        accepted.close()
        served.set()

    path = str(tmp_path / "door")
    with Full(socket.AF_UNIX) as door, socket.socket(socket.AF_UNIX) as client:
        shortage = Shortage(lambda: {"most_connections_uid": 7})
        door.refusals = 100
        door.bind(path)
        door.listen()
        client.connect(path)
        with structlog.testing.capture_logs() as lines:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(accept_forever, door, serve, nursery, shortage)
                await served.wait()
                nursery.cancel_scope.cancel()
    assert [(line["event"], line["most_connections_uid"], line["not_warned"]) for line in lines] == [
        ("connection_not_accepted", 7, 0)
    ]
    assert autojump_clock.rate == 0
