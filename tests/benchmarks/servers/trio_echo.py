"""What plain trio costs. `python trio_echo.py SOCKET`."""

from __future__ import annotations

import socket
import sys

import trio
from answering import RECEIVE_BYTES, answer


async def serve(stream: trio.SocketStream) -> None:
    while data := await stream.receive_some(RECEIVE_BYTES):
        await stream.send_all(answer(data))


async def main(path: str) -> None:
    listener = trio.socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    await listener.bind(path)
    listener.listen(1024)
    await trio.serve_listeners(serve, [trio.SocketListener(listener)])


trio.run(main, sys.argv[1])
