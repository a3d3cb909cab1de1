"""The accept loop: an error of one connection ends nothing else."""

from __future__ import annotations

import errno
import socket
from pathlib import Path

import pytest
import trio

from interceptd.connections.accept import NO_ROOM, accept_forever


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


@pytest.mark.parametrize("number", [errno.ECONNABORTED, errno.EPERM, errno.EAGAIN, *sorted(NO_ROOM)])
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
            nursery.start_soon(accept_forever, door, serve, nursery)
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
                await accept_forever(door, serve, nursery)
