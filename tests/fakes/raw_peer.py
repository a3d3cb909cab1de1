"""A peer that speaks MessagePack-RPC byte by byte, well or badly.

Owns one end of a Unix socket. Must not know what the methods mean, nor the client library.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from contextlib import suppress
from itertools import count
from typing import Self

import trio

from intercept_protocol import rpc
from intercept_protocol.addresses import PAGE_SHIFT
from intercept_protocol.errors import WireError
from intercept_protocol.hv_message import build_memory_intercept
from intercept_protocol.messages import INTERCEPT_METHOD
from intercept_protocol.outcomes import Access, Answer

ANSWERS = {answer.value: answer for answer in Answer}
"""By the pair that goes over the wire."""


class RawPeer:
    """Requests are numbered from 1."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self._stream = stream
        self._receiver = rpc.Receiver({rpc.REQUEST, rpc.RESPONSE, rpc.NOTIFICATION})
        self._msgids = count(1)

    @classmethod
    async def connect(cls, path: str) -> Self:
        return cls(await trio.open_unix_socket(path))

    @classmethod
    def of(cls, end: socket.socket) -> Self:
        return cls(trio.SocketStream(trio.socket.from_stdlib_socket(end)))

    async def send(self, data: bytes) -> None:
        await self._stream.send_all(data)

    def send_now(self, data: bytes, descriptors: Sequence[int] = ()) -> None:
        """Send without a checkpoint; the socket has room."""
        with socket.socket(fileno=os.dup(self._stream.socket.fileno())) as end:
            if descriptors:
                socket.send_fds(end, [data], descriptors)
            else:
                end.send(data, socket.MSG_NOSIGNAL)

    def try_send(self, data: bytes) -> None:
        """Like `send_now`, whether or not anyone is there to read it."""
        with suppress(OSError):
            self.send_now(data)

    @property
    def has_bytes(self) -> bool:
        """Whether something has arrived that was not received yet."""
        with socket.socket(fileno=os.dup(self._stream.socket.fileno())) as end:
            return bool(end.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT))

    async def request(self, method: str, *params: object) -> int:
        """Send a request without waiting for its answer; returns its msgid."""
        msgid = next(self._msgids)
        await self.send(rpc.encode_request(msgid, method, list(params)))
        return msgid

    async def receive(self) -> rpc.Message | None:
        """The next message; None when the daemon has closed."""
        while (message := self._receiver.next_message()) is None:
            data = await self._stream.receive_some()
            if not data:
                return None
            self._receiver.receive_data(bytes(data))
        return message

    async def response(self) -> rpc.Response:
        message = await self.receive()
        assert isinstance(message, rpc.Response), message
        return message

    async def ask(self, method: str, **fields: object) -> object:
        """One call with named fields; raises the `WireError` that answers it."""
        msgid = await self.request(method, fields)
        response = await self.response()
        if response.error is not None:
            raise WireError.from_wire(response.error)
        assert response.msgid == msgid
        return response.result

    async def last_words(self) -> WireError:
        """The error under msgid 0 that a connection ends with, and the end."""
        response = await self.response()
        assert response.msgid == 0, response
        assert await self.receive() is None
        return WireError.from_wire(response.error)

    async def send_intercept(self, gfn: int, access: Access = Access.READ) -> int:
        return await self.request(
            INTERCEPT_METHOD, build_memory_intercept(gpa=gfn << PAGE_SHIFT, access=access)
        )

    async def answer(self) -> Answer:
        """The answer to an intercept that was sent."""
        response = await self.response()
        assert response.error is None, response.error
        assert isinstance(response.result, list)
        return ANSWERS[tuple(response.result)]

    async def intercept(self, gfn: int, access: Access = Access.READ) -> Answer:
        await self.send_intercept(gfn, access)
        return await self.answer()

    async def ask_raw_intercept(self, message: bytes) -> Answer:
        """Hand in 256 bytes of the test's own."""
        await self.request(INTERCEPT_METHOD, message)
        return await self.answer()

    def close(self) -> None:
        """Close at once; idempotent."""
        self._stream.socket.close()
