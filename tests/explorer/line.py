"""A VP's connection without a socket, for a guest that lives in the same process.

Owns the one message and the one answer under way. Must not know what they mean.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import trio

from intercept_protocol import rpc
from intercept_protocol.errors import EncodedError
from intercept_protocol.messages import INTERCEPT_METHOD
from intercept_protocol.outcomes import Answer
from interceptd.connections.connection import Answered, Connection, ConnectionGone, Whole
from interceptd.connections.peer import Peer

_MSGID = 0
_ANSWERS = {rpc.encode_result(_MSGID, answer.value): answer for answer in Answer}
WELCOME = b""
"""What a line is greeted with: nothing, as its guest expects none."""


class Line(Connection):
    """`judge` is called at the instant at which the daemon answers; `named` by the task that serves it."""

    def __init__(self, judge: Callable[[Answer], None], named: Callable[[], None], peer: Peer) -> None:
        # Not super().__init__(): that would take a socket.
        self.peer = peer
        self._judge = judge
        self._named = named
        self._message: bytes | None = None
        self._called = trio.Event()
        self._answer: Answer | None = None
        self._answered = trio.Event()
        self._closed = False

    async def ask(self, message: bytes) -> Answer | None:
        """The guest's end: None if the line is closed before the answer, DRAINING if it was closed before."""
        if self._closed:
            return Answer.DRAINING
        self._message, self._answer, self._answered = message, None, trio.Event()
        self._called.set()
        await self._answered.wait()
        return self._answer

    async def receive_whole(
        self,
        recognise: Callable[[bytes], Whole | None],
    ) -> Whole | rpc.Request | None:
        self._named()
        await self._called.wait()
        self._called = trio.Event()
        message, self._message = self._message, None
        if message is None:
            return None
        return recognise(rpc.encode_request(_MSGID, INTERCEPT_METHOD, [message]))

    async def send(self, data: bytes) -> None:
        assert data == WELCOME, "nothing else is sent without being asked for"

    async def answer(self, data: bytes) -> None:
        self._answer = _ANSWERS[data]
        self._judge(self._answer)
        self._answered.set()

    async def answer_watched(self, answering: Awaitable[Answered]) -> Answered:
        return await answering

    def refuse(self, error: EncodedError, msgid: int = 0) -> None:
        raise ConnectionGone(f"refused {msgid}") from error

    def close(self) -> None:
        self._closed = True
        self._answered.set()
        self._called.set()
