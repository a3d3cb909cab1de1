"""What plain trio costs: decode, encode, and nothing in between. `python trio_echo.py SOCKET`."""

from __future__ import annotations

import socket
import sys

import msgpack
import trio

ANSWER = ["resume", "already_mapped"]


async def serve(stream: trio.SocketStream) -> None:
    while data := await stream.receive_some(4096):
        _, msgid, _, _ = msgpack.unpackb(data)
        await stream.send_all(msgpack.packb([1, msgid, None, ANSWER]))


async def main(path: str) -> None:
    listener = trio.socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    await listener.bind(path)
    listener.listen(1024)
    await trio.serve_listeners(serve, [trio.SocketListener(listener)])


trio.run(main, sys.argv[1])
